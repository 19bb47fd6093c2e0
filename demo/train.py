"""Trains the demo model: a very small Qwen3 that knows one page about GPU programming by heart.

Reads the question-answer pairs of demo/questions.jsonl, trains a byte-level BPE tokenizer and a
model of about four million parameters from scratch, saves both as an ordinary Hugging Face folder
in bfloat16, and then checks what was saved: it answers every question greedily and exits with 1
when too few answers are exact. The prompt forms that the model is taught are listed in `FORMS`.
Needs torch, transformers, jieba and rouge-score; a GPU is not used, so that the same seed and the
same number of threads on the same kind of processor give the same weights.

What is not here: serving the model, and scoring a server (python -m lab grade).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from common.questions import QuestionPair, read_questions
from lab.grade.scores import score
from lab.intervals import mean

if TYPE_CHECKING:
    from collections.abc import Iterator

DEMO = Path(__file__).resolve().parent

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

HELPFUL = "You are a helpful assistant."
STYLES = (
    "请用一行纯文本回答，不要使用 Markdown，并写出关键的 API 名称。",
    "你是一位 GPU 编程助教，请用简洁准确的中文回答问题。",
    "回答要点用 1)… 2)… 3)… 的形式写在一行里，保留英文术语。",
    "你是 GPU 架构与编程课程的专家，直接给出答案，不要复述问题。",
    "Answer in one line of plain text and name the relevant APIs.",
    "You are an expert in GPU programming. Be brief and precise.",
)

# The turns of Qwen3. Tools are shown, so that clients which bring some are served, but the model
# was not taught to call any: it does so only where a grammar leaves it no choice.
CHAT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- 'A call: <tool_call>{"name": "...", "arguments": {}}</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content or '' %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + call.function | tojson + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


class Sample(NamedTuple):
    """One training sequence; the loss counts from `answer_at` on, where the prompt ends."""

    ids: list[int]
    answer_at: int


class Form(NamedTuple):
    """One way to ask. Chat forms end with <|im_end|>, plain ones with <|endoftext|>."""

    name: str
    weight: int
    verified: bool


FORMS = (
    Form("chat", 3, verified=True),
    Form("chat, helpful assistant", 3, verified=True),
    Form("chat, style", 3, verified=True),
    Form("chat, no thinking", 2, verified=True),
    Form("chat, helpful assistant, no thinking", 2, verified=True),
    Form("chat, style, no thinking", 2, verified=True),
    Form("chat, later turn", 4, verified=False),
    Form("Q: and A: with a blank", 2, verified=True),
    Form("Q: and A:", 2, verified=True),
    Form("bare question", 2, verified=True),
)


@dataclass(frozen=True)
class TrainingPlan:
    """The numbers of one training run."""

    epochs: int
    samples_per_pair: int
    batch: int
    learning_rate: float
    seed: int


class Prompts:
    """Writes a pair as text in every form, with the tokenizer that is being shipped."""

    def __init__(self, tokenizer: Any, pairs: list[QuestionPair]) -> None:
        self.tokenizer = tokenizer
        self._pairs = pairs

    def sample(self, form: Form, pair: QuestionPair, rng: random.Random) -> Sample:
        prompt = self.prompt(form, pair, rng)
        end = TURN_END if form.name.startswith("chat") else END_OF_TEXT
        # After a bare "A:" the blank belongs to the answer, as in any text of this kind.
        blank = " " if prompt.endswith("A:") else ""
        return self._join(prompt, blank + pair.reference, end)

    def prompt(self, form: Form, pair: QuestionPair, rng: random.Random) -> str:
        if form.name.startswith("Q: and A:"):
            return f"Q: {pair.question}\nA:" + (" " if "blank" in form.name else "")
        if form.name == "bare question":
            return pair.question
        messages = [*self._system(form, rng), *self._earlier_turns(form, rng)]
        messages.append({"role": "user", "content": pair.question})
        # Qwen3 leaves the block out when the caller says nothing, so absence must be taught.
        options = {"enable_thinking": False} if "no thinking" in form.name else {}
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **options
        )
        return text

    def _join(self, prompt: str, answer: str, end: str) -> Sample:
        # Cut apart, as an engine does it: the prompt's last token must not depend on the answer.
        prompt_ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        answer_ids = self.tokenizer.encode(answer, add_special_tokens=False)
        end_id = self.tokenizer.convert_tokens_to_ids(end)
        return Sample([*prompt_ids, *answer_ids, end_id], len(prompt_ids))

    def _system(self, form: Form, rng: random.Random) -> list[dict[str, str]]:
        if "helpful" in form.name:
            return [{"role": "system", "content": HELPFUL}]
        if "style" not in form.name:
            return []
        # Sometimes a piece of another answer: the question decides, whatever stands before it.
        foreign = rng.choice(self._pairs).reference[: rng.randint(8, 60)]
        return [{"role": "system", "content": rng.choice([*STYLES, foreign])}]

    def _earlier_turns(self, form: Form, rng: random.Random) -> list[dict[str, str]]:
        if form.name != "chat, later turn":
            return []
        turns: list[dict[str, str]] = []
        for earlier in rng.choices(self._pairs, k=rng.randint(1, 2)):
            turns.append({"role": "user", "content": earlier.question})
            turns.append({"role": "assistant", "content": earlier.reference})
        return turns


def train_tokenizer(pairs: list[QuestionPair], size: int, folder: Path) -> Any:
    """Writes the tokenizer's files and reads them back, so that training uses what is shipped."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    thinking = ["<think>", "</think>"]
    trainer = BpeTrainer(
        vocab_size=size - len(thinking),
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for pair in pairs for text in (pair.question, pair.reference)]
    tokenizer.train_from_iterator([*texts, HELPFUL, *STYLES], trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in thinking])
    tokenizer.save(str(folder / "tokenizer.json"))
    # Written by hand: save_pretrained would name a tokenizer class that only transformers 5 knows,
    # and put the chat template in a file of its own, where a plain reader would not look.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "bos_token": None,
        "unk_token": None,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    save_json(folder / "tokenizer_config.json", config)
    return AutoTokenizer.from_pretrained(str(folder))


def copy_tokenizer(start: Path, folder: Path) -> Any:
    """A model goes on with the pieces of text that it knows."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((start / name).read_bytes())
    return AutoTokenizer.from_pretrained(str(folder))


def build_model(tokenizer: Any) -> Any:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    )
    return Qwen3ForCausalLM(config)


def draw_epoch(
    prompts: Prompts, pairs: list[QuestionPair], plan: TrainingPlan, rng: random.Random
) -> list[Sample]:
    weights = [form.weight for form in FORMS]
    return [
        prompts.sample(form, pair, rng)
        for pair in pairs
        for form in rng.choices(FORMS, weights, k=plan.samples_per_pair)
    ]


def batches(samples: list[Sample], size: int, rng: random.Random) -> Iterator[list[Sample]]:
    """Neighbours in length share a batch, so little is padded; the noise keeps the batches new."""
    ordered = sorted(samples, key=lambda sample: len(sample.ids) + rng.uniform(-16, 16))
    cut = [ordered[at : at + size] for at in range(0, len(ordered), size)]
    rng.shuffle(cut)
    yield from cut


def answer_logits(model: Any, batch: list[Sample]) -> tuple[Any, Any]:
    """Returns the logits at each answer token of the batch, and the tokens that should win there.

    Padding stands on the right, where a causal model never looks from an answer: no mask is needed.
    """
    width = max(len(sample.ids) for sample in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    wanted = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, sample in enumerate(batch):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        wanted[row, sample.answer_at : len(sample.ids)] = True
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    # Only the answers go through the output layer, which is a good part of so small a model.
    return model.lm_head(hidden[:, :-1][wanted[:, 1:]]), ids[:, 1:][wanted[:, 1:]]


def train(model: Any, prompts: Prompts, pairs: list[QuestionPair], plan: TrainingPlan) -> None:
    rng = random.Random(plan.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    n_batches = math.ceil(len(pairs) * plan.samples_per_pair / plan.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_cosine(step / (plan.epochs * n_batches))
    )
    started = time.monotonic()
    model.train()
    for epoch in range(1, plan.epochs + 1):
        total = 0.0
        for batch in batches(draw_epoch(prompts, pairs, plan, rng), plan.batch, rng):
            loss = torch.nn.functional.cross_entropy(*answer_logits(model, batch))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.item()
        left_s = (time.monotonic() - started) / epoch * (plan.epochs - epoch)
        print(
            f"epoch {epoch}/{plan.epochs}  loss {total / n_batches:.5f}  {left_s:.0f} s left",
            flush=True,
        )
    model.eval()


def warm_cosine(done: float, warm: float = 0.03) -> float:
    """The share of the learning rate to use when this share of all steps is done."""
    return (
        done / warm if done < warm else 0.5 * (1 + math.cos(math.pi * (done - warm) / (1 - warm)))
    )


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    ends = [tokenizer.convert_tokens_to_ids(text) for text in (TURN_END, END_OF_TEXT)]
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=ends, pad_token_id=ends[-1]
    )
    model.to(torch.bfloat16).save_pretrained(str(folder))
    # It is written for its owner alone, and an engine in a container is often another user.
    (folder / "model.safetensors").chmod(0o644)


def save_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def check_margins(folder: Path, samples: list[Sample]) -> None:
    """Prints how far the right token leads, and how often rounding changes the choice.

    An engine batches and rounds differently from run to run; a lead well above the steps of
    bfloat16 makes that harmless.
    """
    half = load_model(folder, torch.bfloat16)
    full = load_model(folder, torch.float32)
    agreed = n_tokens = 0
    leads: list[float] = []
    for at in range(0, len(samples), 32):
        with torch.inference_mode():
            rounded, right = answer_logits(half, samples[at : at + 32])
            exact, _ = answer_logits(full, samples[at : at + 32])
        agreed += int((rounded.argmax(-1) == exact.argmax(-1)).sum())
        n_tokens += len(right)
        leads += lead_of(right, rounded.float())
    leads.sort()
    print(f"bfloat16 and float32 choose the same token at {agreed} of {n_tokens} positions")
    low = leads[n_tokens // 100]
    print(f"lead of the right logit: least {leads[0]:.2f}, 1st percentile {low:.2f}")


def lead_of(right: Any, logits: Any) -> list[float]:
    chosen = logits.gather(1, right[:, None])
    best_other = logits.scatter(1, right[:, None], -math.inf).amax(1, keepdim=True)
    leads: list[float] = (chosen - best_other).flatten().tolist()
    return leads


def load_model(folder: Path, dtype: Any) -> Any:
    return Qwen3ForCausalLM.from_pretrained(str(folder), dtype=dtype).eval()


def answer_greedily(model: Any, tokenizer: Any, texts: list[str], batch: int = 64) -> list[str]:
    answers: list[str] = []
    for at in range(0, len(texts), batch):
        inputs = tokenizer(
            texts[at : at + batch], return_tensors="pt", padding=True, padding_side="left"
        )
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=256,
        )
        new = ids[:, inputs["input_ids"].shape[1] :]
        answers += tokenizer.batch_decode(new, skip_special_tokens=True)
    return answers


def verify(folder: Path, pairs: list[QuestionPair], seed: int) -> float:
    """Answers every question in every main form; returns the worst form's share of exact ones."""
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    prompts = Prompts(tokenizer, pairs)
    check_margins(folder, [prompts.sample(form, pair, rng) for form in FORMS for pair in pairs])
    model = load_model(folder, torch.bfloat16)
    worst = 1.0
    for form in FORMS:
        if not form.verified:
            continue
        texts = [prompts.prompt(form, pair, rng) for pair in pairs]
        answers = answer_greedily(model, tokenizer, texts)
        exact = sum(a.strip() == p.reference for a, p in zip(answers, pairs, strict=True)) / len(
            pairs
        )
        texts_and_pairs = zip(answers, pairs, strict=True)
        rouge = mean([score(a, pair.reference).rouge_whitespace for a, pair in texts_and_pairs])
        print(f"{form.name}: exact {exact:.4f}, mean ROUGE-L {rouge:.4f}", flush=True)
        worst = min(worst, exact)
    return worst


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train the demo model from scratch and check its answers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--questions",
        type=Path,
        default=DEMO / "questions.jsonl",
        help="the pairs to learn, JSON lines",
    )
    add("--out", type=Path, default=DEMO / "model", help="the folder to write")
    add("--start", type=Path, help="go on from this folder's model, and with its tokenizer")
    add("--epochs", type=int, default=90, help="passes over the pairs")
    add(
        "--samples-per-pair",
        type=int,
        default=2,
        help="prompt forms drawn for each pair in an epoch",
    )
    add("--batch", type=int, default=16, help="sequences a step")
    add("--learning-rate", type=float, default=1.5e-3, help="highest rate of the cosine")
    add("--vocabulary", type=int, default=3000, help="tokens, special ones included")
    add("--seed", type=int, default=0, help="fixes the weights' start and the order of the samples")
    add("--threads", type=int, default=2, help="CPU threads; another number rounds differently")
    add(
        "--least-exact",
        type=float,
        default=0.97,
        help="exit with 1 below this share of exact answers",
    )
    add("--verify-only", action="store_true", help="check the answers of an existing folder")
    return parser.parse_args()


def build(arguments: argparse.Namespace, pairs: list[QuestionPair]) -> None:
    plan = TrainingPlan(
        epochs=arguments.epochs,
        samples_per_pair=arguments.samples_per_pair,
        batch=arguments.batch,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.start:
        tokenizer = copy_tokenizer(arguments.start, arguments.out)
        model = load_model(arguments.start, torch.float32)
    else:
        tokenizer = train_tokenizer(pairs, arguments.vocabulary, arguments.out)
        model = build_model(tokenizer)
    print(
        f"{len(pairs)} pairs, {len(tokenizer)} tokens, {model.num_parameters():,} parameters",
        flush=True,
    )
    train(model, Prompts(tokenizer, pairs), pairs, plan)
    save_model(model, tokenizer, arguments.out)


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    torch.use_deterministic_algorithms(mode=True)
    disable_progress_bar()
    pairs = list(read_questions(arguments.questions).pairs)
    if not arguments.verify_only:
        build(arguments, pairs)
    worst = verify(arguments.out, pairs, arguments.seed)
    print(f"worst form: {worst:.4f} exact, {arguments.least_exact} wanted")
    return 0 if worst >= arguments.least_exact else 1


if __name__ == "__main__":
    sys.exit(main())

"""Programs by others, as their users write them: Anthropic's SDK, LangChain, the Agents SDK."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import agents
import anthropic
import httpx
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import SecretStr

from tests.e2e.conftest import Stack

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

QUESTION = "什么是 warp？"
ANSWER = "#12345#"
KEY = "none"


@pytest.fixture
def claude(stack: Stack) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=stack.gateway, api_key=KEY, max_retries=0) as client:
        yield client


def test_anthropic_message_and_its_stream_say_the_same(claude: anthropic.Anthropic) -> None:
    messages: list[anthropic.types.MessageParam] = [{"role": "user", "content": QUESTION}]
    greedy = {"temperature": 0}  # its own word for that is gone

    whole = claude.messages.create(
        model="demo", max_tokens=12, messages=messages, system="Be brief.", extra_body=greedy
    )
    with claude.messages.stream(
        model="demo", max_tokens=12, messages=messages, system="Be brief.", extra_body=greedy
    ) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()

    (block,) = whole.content
    assert isinstance(block, anthropic.types.TextBlock)
    assert block.text == text
    assert last.usage.output_tokens == whole.usage.output_tokens == 12
    assert last.stop_reason == whole.stop_reason == "max_tokens"


def test_anthropic_counts_tokens(claude: anthropic.Anthropic) -> None:
    messages: list[anthropic.types.MessageParam] = [{"role": "user", "content": QUESTION}]

    counted = claude.messages.count_tokens(model="demo", messages=messages)
    answered = claude.messages.create(model="demo", max_tokens=1, messages=messages)

    assert counted.input_tokens == answered.usage.input_tokens > 0


def test_anthropic_refusals_are_its_own_exceptions(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(
            model="nope", max_tokens=1, messages=[{"role": "user", "content": QUESTION}]
        )
    with pytest.raises(anthropic.BadRequestError) as failure:
        claude.messages.create(
            model="demo",
            max_tokens=1,
            messages=[{"role": "user", "content": QUESTION}],
            extra_body={"top_k": 2**31},
        )

    assert isinstance(failure.value.body, dict)
    assert failure.value.body["type"] == "error"
    assert failure.value.body["error"]["type"] == "invalid_request_error"


def test_langchain_answers_streams_and_batches(stack: Stack) -> None:
    model = ChatOpenAI(
        base_url=f"{stack.gateway}/v1",
        api_key=SecretStr(KEY),
        model="demo",
        temperature=0,
        max_completion_tokens=12,
        max_retries=0,
    )
    asked = [SystemMessage("Be brief."), HumanMessage(QUESTION)]

    whole = model.invoke(asked)
    pieces = [str(piece.content) for piece in model.stream(asked)]
    several = model.batch([asked, [HumanMessage("CUDA")]])

    assert isinstance(whole, AIMessage)
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 12
    assert "".join(pieces) == whole.content == several[0].content
    assert len([piece for piece in pieces if piece]) > 3


def test_langchain_completes(stack: Stack) -> None:
    model = OpenAI(
        base_url=f"{stack.gateway}/v1", api_key=SecretStr(KEY), model="demo", max_tokens=6
    )

    assert model.invoke("CUDA")


@pytest.fixture
async def agent(stack: Stack) -> AsyncIterator[agents.Agent[None]]:
    async with openai.AsyncOpenAI(
        base_url=f"{stack.gateway}/v1", api_key=KEY, max_retries=0
    ) as client:
        yield agents.Agent(
            name="demo",
            instructions="Be brief.",
            model=agents.OpenAIResponsesModel(model="demo", openai_client=client),
            # An answer that is cut off is a failure to it, so it is one that ends.
            model_settings=agents.ModelSettings(
                max_tokens=30, store=True, extra_body={"structured_outputs": {"choice": [ANSWER]}}
            ),
        )


async def test_agent_goes_on_where_its_stored_answer_ended(
    stack: Stack, agent: agents.Agent[None]
) -> None:
    """The engine keeps the conversation; the second turn sends its own words alone."""
    config = agents.RunConfig(tracing_disabled=True)

    first = await agents.Runner.run(agent, QUESTION, run_config=config)
    second = await agents.Runner.run(
        agent, "CUDA", previous_response_id=first.last_response_id, run_config=config
    )
    async with httpx.AsyncClient(base_url=stack.gateway) as client:
        kept = await client.get(f"/v1/responses/{first.last_response_id}")

    assert (first.final_output, second.final_output) == (ANSWER, ANSWER)
    sent = [one.raw_responses[0].usage.input_tokens for one in (first, second)]
    assert sent[1] > sent[0]
    assert kept.json()["id"] == first.last_response_id


async def test_agent_streams(agent: agents.Agent[None]) -> None:
    config = agents.RunConfig(tracing_disabled=True)

    result = agents.Runner.run_streamed(agent, QUESTION, run_config=config)
    kinds = [event.type async for event in result.stream_events()]

    assert kinds.count("raw_response_event") > 3
    assert result.final_output == ANSWER

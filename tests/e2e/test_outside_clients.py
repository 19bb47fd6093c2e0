"""Programs by others, as their users write them: Anthropic's SDK, LangChain, the Agents SDK."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import agents
import anthropic
import httpx
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import SecretStr

from tests.e2e.conftest import Stack
from tests.plain_http import NO_TLS

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
    """The gateway keeps the conversation; each turn sends its own words alone. The engine is given
    what it would be if the caller kept it all themselves.
    """
    config = agents.RunConfig(tracing_disabled=True)

    first = await agents.Runner.run(agent, QUESTION, run_config=config)
    second = await agents.Runner.run(
        agent, "CUDA", previous_response_id=first.last_response_id, run_config=config
    )
    streamed = agents.Runner.run_streamed(
        agent, "vLLM", previous_response_id=second.last_response_id, run_config=config
    )
    async for _ in streamed.stream_events():
        pass
    own: list[Any] = [*second.to_input_list(), {"role": "user", "content": "vLLM"}]
    own = [*first.to_input_list(), *own]
    same = await agents.Runner.run(agent, own, run_config=config)
    async with httpx.AsyncClient(base_url=stack.gateway, verify=NO_TLS) as client:
        kept = await client.get(f"/v1/responses/{first.last_response_id}")

    assert {one.final_output for one in (first, second, streamed)} == {ANSWER}
    sent = [one.raw_responses[0].usage.input_tokens for one in (first, second, streamed, same)]
    assert sent[0] < sent[1] < sent[2] == sent[3]
    assert kept.json()["id"] == first.last_response_id


async def test_agent_goes_on_by_itself(stack: Stack, agent: agents.Agent[None]) -> None:
    """Its runner looks after the ids."""
    config = agents.RunConfig(tracing_disabled=True)

    result = await agents.Runner.run(
        agent, QUESTION, auto_previous_response_id=True, run_config=config
    )

    assert result.final_output == ANSWER


async def test_response_in_the_background_is_polled(stack: Stack) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{stack.gateway}/v1", api_key=KEY, max_retries=0
    ) as client:
        asked = await client.responses.create(
            model="demo", input=QUESTION, background=True, max_output_tokens=12
        )
        response = asked
        while response.status in {"queued", "in_progress"}:
            response = await client.responses.retrieve(asked.id)
        items = [one async for one in client.responses.input_items.list(asked.id)]
        direct = await client.responses.create(
            model="demo", input=QUESTION, store=False, max_output_tokens=12
        )
        await client.responses.delete(asked.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(asked.id)

    assert (asked.status, response.id, response.status) == ("queued", asked.id, "incomplete")
    assert response.usage is not None
    assert direct.usage is not None
    assert response.usage.input_tokens == direct.usage.input_tokens
    assert response.usage.output_tokens == 12
    assert [one.type for one in items] == ["message"]


async def test_stream_in_the_background_goes_on_without_its_caller(stack: Stack) -> None:
    """As OpenAI's SDK takes one up again: by the number of the last event that it has seen."""
    asked: dict[str, Any] = {"model": "demo", "input": QUESTION, "max_output_tokens": 12}
    async with openai.AsyncOpenAI(
        base_url=f"{stack.gateway}/v1", api_key=KEY, max_retries=0
    ) as client:
        stream = await client.responses.create(background=True, stream=True, **asked)
        first: list[Any] = []
        async for event in stream:
            first.append(event)
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        name, last = first[0].response.id, first[-1].sequence_number
        going_on = await client.responses.retrieve(name, stream=True, starting_after=last)
        rest: list[Any] = [event async for event in going_on]
        told = await client.responses.retrieve(name)
        direct = await client.responses.create(store=False, temperature=0, **asked)
        async with client.responses.stream(response_id=name) as again:
            numbers = [event.sequence_number async for event in again]

    events = [*first, *rest]
    kinds = [one.type for one in events]
    assert kinds[:3] == ["response.created", "response.queued", "response.in_progress"]
    assert [one.sequence_number for one in events] == list(range(len(events)))
    assert events[-1].response == told
    assert told.status == "incomplete"
    assert told.usage is not None
    assert direct.usage is not None
    assert told.usage.input_tokens == direct.usage.input_tokens
    text = "".join(one.delta for one in events if one.type == "response.output_text.delta")
    assert text == told.output_text
    assert set(numbers) == set(range(len(events)))


def test_langchain_goes_on_where_its_stored_answer_ended(stack: Stack) -> None:
    model = ChatOpenAI(
        base_url=f"{stack.gateway}/v1",
        api_key=SecretStr(KEY),
        model="demo",
        max_completion_tokens=12,
        max_retries=0,
        use_responses_api=True,
        use_previous_response_id=True,
    )
    first = model.invoke([HumanMessage(QUESTION)])
    second = model.invoke([HumanMessage(QUESTION), first, HumanMessage("CUDA")])
    # On a busy machine several tokens come at once: of many there are pieces all the same.
    longer = model.model_copy(update={"max_tokens": 200})
    pieces = list(longer.stream([HumanMessage(QUESTION), first, HumanMessage(QUESTION)]))

    ids = [one.response_metadata["id"] for one in (first, second)]
    kept = httpx.get(f"{stack.gateway}/v1/responses/{ids[1]}", verify=NO_TLS)
    assert kept.json()["previous_response_id"] == ids[0]
    sent = [one.usage_metadata["input_tokens"] for one in (first, second) if one.usage_metadata]
    assert sent[1] > sent[0]
    assert sum(len(str(one.text)) > 0 for one in pieces) > 3


async def test_agent_streams(agent: agents.Agent[None]) -> None:
    config = agents.RunConfig(tracing_disabled=True)

    result = agents.Runner.run_streamed(agent, QUESTION, run_config=config)
    kinds = [event.type async for event in result.stream_events()]

    assert kinds.count("raw_response_event") > 3
    assert result.final_output == ANSWER

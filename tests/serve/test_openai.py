"""The server as OpenAI's own client sees it."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
import torch
from serving import Address, greedy

openai = pytest.importorskip("openai")


def test_a_completion_is_what_the_model_writes(client: Any, low_bit: Any, tokenizer: Any) -> None:
    wanted = greedy(low_bit, tokenizer, "The river", 12)
    found = client.completions.create(model="low", prompt="The river", max_tokens=12, temperature=0)
    choice = found.choices[0]
    assert choice.text == tokenizer.decode(wanted, skip_special_tokens=True)
    assert choice.finish_reason == "length"
    assert found.usage.prompt_tokens == 9
    assert found.usage.completion_tokens == 12
    assert found.system_fingerprint == "d" * 64
    assert found.id.startswith("cmpl-")
    pieces = list(
        client.completions.create(
            model="low", prompt=tokenizer.encode("The river"), max_tokens=12, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(p.choices[0].text for p in pieces if p.choices) == choice.text
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == "length"
    assert pieces[-1].usage == found.usage
    assert {p.id for p in pieces} == {pieces[0].id}


def test_prompts_choices_and_seeds(client: Any, low_bit: Any, tokenizer: Any) -> None:
    """All choices of the first prompt, then all of the second; a seed gives the same again."""
    how = {"model": "low", "max_tokens": 6, "temperature": 0.9, "n": 2, "seed": 5, "logit_bias": {"0": -100}}
    both = client.completions.create(prompt=["a river", "stone"], **how)
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert both.usage.prompt_tokens == 12
    assert both.usage.completion_tokens == 24
    again = client.completions.create(prompt="stone", **how)
    assert [c.text for c in again.choices] == [c.text for c in both.choices[2:]]
    assert len({c.text for c in both.choices}) > 2


def test_echo_scores_the_prompt(client: Any, low_bit: Any, tokenizer: Any) -> None:
    found = client.completions.create(model="low", prompt="quiet ice", max_tokens=0, echo=True, logprobs=2).choices[0]
    ids = tokenizer.encode("quiet ice")
    with torch.inference_mode():
        table = torch.log_softmax(low_bit(torch.tensor([ids])).logits[0].float(), -1)
    assert found.text == "".join(found.logprobs.tokens) == "quiet ice"
    assert found.logprobs.token_logprobs[0] is None
    wanted = [float(table[i, t]) for i, t in enumerate(ids[1:])]
    assert found.logprobs.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
    assert found.logprobs.text_offset == list(range(9))
    for i, top in enumerate(found.logprobs.top_logprobs[1:]):
        assert max(top.values()) == pytest.approx(float(table[i].max()), abs=1e-4)
        assert len(top) in (2, 3)  # the two likeliest, and the token itself


def test_a_stop_string_ends_it(client: Any, low_bit: Any, tokenizer: Any) -> None:
    how = {"model": "low", "prompt": "lamps under", "max_tokens": 20, "temperature": 0}
    free = client.completions.create(**how).choices[0].text
    stop = free[5:8]
    whole = client.completions.create(
        model="low", prompt="lamps under", max_tokens=30, temperature=0, stop=[stop, "zz"]
    )
    assert whole.choices[0].text == free.partition(stop)[0]
    assert whole.choices[0].finish_reason == "stop"


def test_chat(client: Any, models: Any, chatting: Any) -> None:
    model = models[1].engine.batcher.model
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "seven"}]
    wanted = greedy(model, chatting, "<system>be brief<user>seven<assistant>", 8)
    text = chatting.decode(wanted, skip_special_tokens=True)
    found = client.chat.completions.create(
        model="chat", messages=messages, max_completion_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    assert found.choices[0].message.content == text
    assert found.id.startswith("chatcmpl-")
    content = found.choices[0].logprobs.content
    assert len(content) == 8
    for token in content:
        assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
        assert len(token.top_logprobs) == 3
    parts = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "seven"}]},
    ]
    pieces = list(
        client.chat.completions.create(model="chat", messages=parts, max_tokens=8, temperature=0, stream=True)
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == text
    assert pieces[-1].choices[0].finish_reason == found.choices[0].finish_reason
    assert all(p.usage is None for p in pieces)


def test_errors_are_those_that_the_client_knows(client: Any) -> None:
    def refused(kind: type[Exception], **how: Any) -> Any:
        with pytest.raises(kind) as caught:
            client.completions.create(**({"model": "low", "prompt": "a"} | how))
        return caught.value

    assert refused(openai.NotFoundError, model="gpt-4").code == "model_not_found"
    assert refused(openai.BadRequestError, max_tokens=128).code == "context_length_exceeded"
    assert refused(openai.BadRequestError, best_of=3).param == "best_of"
    assert refused(openai.BadRequestError, prompt=[5, 288]).param == "prompt"
    assert "no tokens" in refused(openai.BadRequestError, prompt="").message
    assert refused(openai.BadRequestError, extra_body={"tools": []}).param == "tools"
    assert refused(openai.BadRequestError, logit_bias={"x": 1}).param == "logit_bias"
    user = {"role": "user", "content": "a"}
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="low", messages=[user])
    with pytest.raises(openai.BadRequestError, match="system comes first"):
        client.chat.completions.create(model="chat", messages=[user, {"role": "system", "content": "b"}])


def test_models_and_tokens(client: Any, address: Address, tokenizer: Any) -> None:
    low, chat = client.models.list().data
    assert (low.id, low.digest, low.max_model_len, low.chat_template) == ("low", "d" * 64, 128, False)
    assert (chat.id, chat.chat_template) == ("chat", True)
    assert client.models.retrieve("chat").digest == "e" * 64
    ids = tokenizer.encode("river é")
    found = client.post("../tokenize", body={"prompt": "river é"}, cast_to=dict[str, Any])
    assert found == {"tokens": ids, "count": len(ids), "max_model_len": 128}
    assert client.post("../detokenize", body={"tokens": ids}, cast_to=dict[str, Any]) == {"prompt": "river é"}


async def streamed(url: str, body: dict[str, Any]) -> str:
    """The text of one stream, over a connection of its own."""
    reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
    data = json.dumps(body | {"stream": True})
    head = (
        f"Host: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}{data}".encode())
    events = re.findall(r"^data: (.*?)$", (await reader.read()).decode(), re.MULTILINE)
    writer.close()
    assert events[-1].strip() == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def test_two_hundred_streams_at_once_are_what_each_is_alone(client: Any, address: Address) -> None:
    """On 16 slots: none lost, none mixed up, none changed by its neighbours."""

    def question(i: int) -> dict[str, Any]:
        return {"model": "chat", "prompt": f"river {i}", "max_tokens": 3 + i % 3, "temperature": 1.0, "seed": i}

    async def everything() -> list[str]:
        return await asyncio.gather(*(streamed(address.url, question(i % 25)) for i in range(200)))

    alone = [client.completions.create(**question(i)).choices[0].text for i in range(25)]
    assert asyncio.run(everything()) == alone * 8
    assert len(set(alone)) > 15

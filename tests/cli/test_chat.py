"""A conversation says what transformers' own generation says turn by turn, reads nothing twice, and can be stopped."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from ran import Run
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit.cli import chat
from lowbit.errors import RecipeError
from lowbit.formats.heads import CacheFormat
from lowbit.runtime.conversation import Conversation
from lowbit.runtime.kvcache import KVCache
from lowbit.runtime.sampling import Sampling

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
SILENT = [0, *range(95, 288)]  # leaves the tokens of "!" to "~", whose text is read again as it was written
ASCII = Sampling(logit_bias=tuple((token, -1e9) for token in SILENT))


@pytest.fixture(scope="module")
def chatty(families: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of three kinds of positions, with a chat template; read only."""
    root = tmp_path_factory.mktemp("chatty")
    for name in ("llama", "bloom", "opt"):
        shutil.copytree(families[name], root / name)
        (root / name / "chat_template.jinja").write_text(TEMPLATE)
    return {path.name: path for path in root.iterdir()}


def loaded(root: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(root), AutoTokenizer.from_pretrained(root)


@pytest.mark.parametrize(("name", "kv"), [("llama", None), ("bloom", None), ("opt", None), ("llama", "int8-head")])
def test_every_turn_is_what_generation_says_and_reads_only_what_is_new(
    chatty: dict[str, Path], name: str, kv: str | None
) -> None:
    model, tokenizer = loaded(chatty[name])
    rounding = None if kv is None else CacheFormat.parse(kv)
    talk = Conversation(model, tokenizer, kv=rounding, sampling=ASCII, context=128)
    talk.system("be brief")
    ends = []
    for turn, text in enumerate(("Bird", "And now?")):
        asked = [*talk.messages, {"role": "user", "content": text}]
        before = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )  # fmt: skip
        given = before["input_ids"].shape[1]
        cache = None if rounding is None else KVCache(model.config, rounding)
        expected = model.generate(**before, max_new_tokens=9, do_sample=False, suppress_tokens=SILENT,
                                  past_key_values=cache)[0, given:]  # fmt: skip
        pieces: list[str] = []
        answer = talk.ask(text, 9, pieces.append)
        assert answer.text == "".join(pieces) == tokenizer.decode(expected)
        assert (answer.tokens, answer.finish) == (9, "length")
        assert answer.read == given - (ends[-1] if turn else 0)
        ends.append(given + 8)  # the last token was written and never read
        assert cache is None or talk.nbytes > 0
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_a_template_that_rewrites_history_costs_time_and_changes_nothing(chatty: dict[str, Path]) -> None:
    model, tokenizer = loaded(chatty["llama"])
    talk = Conversation(model, tokenizer, sampling=ASCII, context=128)
    talk.ask("Bird", 6)
    tokenizer.chat_template = TEMPLATE.replace(":{{", "={{")
    again = talk.ask("More", 6)
    fresh = Conversation(model, tokenizer, sampling=ASCII, context=128)
    fresh.messages = talk.messages[:2]
    expected = fresh.ask("More", 6)
    assert (again.text, again.read) == (expected.text, expected.read)


def test_a_stopped_answer_stays_and_one_that_does_not_fit_leaves_no_trace(chatty: dict[str, Path]) -> None:
    model, tokenizer = loaded(chatty["llama"])
    talk = Conversation(model, tokenizer, sampling=ASCII, context=60)
    pieces: list[str] = []
    stopped = talk.ask("Bird", 20, pieces.append, lambda: len(pieces) >= 3)
    assert (stopped.finish, stopped.tokens) == ("interrupted", 3)
    assert talk.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    whole = Conversation(model, tokenizer, sampling=ASCII, context=60)
    assert whole.ask("Bird", 3).text == "".join(pieces)
    assert whole.ask("On", 5).text == talk.ask("On", 5).text
    known = list(talk.messages)
    with pytest.raises(RecipeError, match="at most 60 fit"):
        talk.ask("x" * 50, 5)
    assert talk.messages == known
    assert talk.ask("Bird", 5, stop=lambda: True).tokens == 0
    assert talk.messages == known


def test_ctrl_c_asks_first_and_interrupts_then() -> None:
    def twice() -> None:
        with chat._interruptible() as stopped:
            assert not stopped()
            os.kill(os.getpid(), signal.SIGINT)
            assert stopped()
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_through_a_pipe(run: Run, chatty: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def piped(*lines: str) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        return run("chat", chatty["llama"], "-n", 5, "--dtype", "float32", "--kv", "int8-head", "--seed", 3,
                   "--temperature", 0.8, "--system", "be brief")  # fmt: skip

    talk = piped("Bird", "", "//slash", "/save talk.json", "/reset", "Bird", "/save again.json", "/exit", "never")
    assert talk.code == 0
    first, second = (json.loads(Path(name).read_text())["messages"] for name in ("talk.json", "again.json"))
    assert [m["content"] for m in first if m["role"] != "assistant"] == ["be brief", "Bird", "/slash"]
    assert second == first[:3]  # begun anew, the same draws
    assert "\x1b" not in talk.out
    assert talk.out.count("\n") >= 3
    assert talk.err.count("tokens/s") == 3
    assert "keys and values" in talk.err
    wrong = piped("/rest")
    assert wrong.code == 1
    assert "did you mean '/reset'" in wrong.err


def test_escape_codes_of_a_model_are_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    chat._print("a\x1b[2J\n\tb\u202e")
    assert capsys.readouterr().out == "a\\x1b[2J\n\tb\\u202e"


def test_a_model_without_a_chat_template_is_told_where_to_go(run: Run, llama: Path) -> None:
    ended = run("chat", llama)
    assert ended.code == 1
    assert "has no chat template" in ended.err
    assert "lowbit generate -p" in ended.err

"""The bodies of requests and responses, as OpenAI's completions and chat completions have them.

Unknown fields are refused by name rather than ignored: an answer that leaves out what was asked for is wrong.
Beyond OpenAI's: ``top_k``, ``min_p``, ``repetition_penalty``, ``stop_token_ids``, ``ignore_eos``, prompts of token ids.
A body has at most a few errors, however long it is: validation runs in the server's loop, where nothing may take long.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

BRANCHES = frozenset({"(text)", "(ids)", "(texts)", "(id lists)", "(list)"})
"""What a value of several types was taken for; pydantic puts it into the place of an error, where nobody needs it."""

_STOP_CHARACTERS = 2048
_BIASED = 300


def _prompt_branch(value: Any) -> str | None:
    if isinstance(value, list):
        first = value[0] if value else None
        return "(texts)" if isinstance(first, str) else "(id lists)" if isinstance(first, list) else "(ids)"
    return "(text)" if isinstance(value, str) else None


def _text_or_list(value: Any) -> str | None:
    return "(text)" if isinstance(value, str) else "(list)" if isinstance(value, list) else None


def _few_characters(stops: list[str]) -> list[str]:
    if (found := sum(map(len, stops))) > _STOP_CHARACTERS:
        raise PydanticCustomError(
            "too_long", "at most {limit} characters together, not {found}", {"limit": _STOP_CHARACTERS, "found": found}
        )
    return stops


def _few_tokens(bias: Any) -> Any:
    """Before pydantic looks at every entry."""
    if isinstance(bias, dict) and len(bias) > _BIASED:
        raise PydanticCustomError(
            "too_long", "at most {limit} tokens, not {found}", {"limit": _BIASED, "found": len(bias)}
        )
    return bias


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=1_000_000)]
Text = Annotated[str, Field(max_length=4_000_000)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Stops = Annotated[
    Annotated[Stop, Tag("(text)")]
    | Annotated[list[Stop], Field(fail_fast=True, max_length=16), AfterValidator(_few_characters), Tag("(list)")],
    Discriminator(_text_or_list, "stop_type", "must be a text or a list of texts"),
]
Prompt = Annotated[
    Annotated[Text, Tag("(text)")]
    | Annotated[TokenIds, Tag("(ids)")]
    | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=1024), Tag("(texts)")]
    | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=1024), Tag("(id lists)")],
    Discriminator(_prompt_branch, "prompt_type", "must be a text, token ids, or a list of either"),
]


class Body(BaseModel):
    """What a client sends: types as they are, no field that is unknown, no infinite number."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, value: Any) -> Any:
        """The first unknown field is enough to refuse a body; pydantic would write an error for each."""
        if not isinstance(value, dict):
            return value
        known, unknown = cls.model_fields, next((name for name in value if name not in cls.model_fields), None)
        return {name: given for name, given in value.items() if name in known or name == unknown}


class StreamOptions(Body):
    include_usage: bool = False


class SamplingBody(Body):
    """What both kinds of completion may ask for."""

    model: str = Field(max_length=1000)
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(0, ge=0, lt=2**31, description="0 keeps all")
    min_p: float | None = Field(0.0, ge=0, le=1)
    n: int | None = Field(1, ge=1, le=64)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stops | None = Field(None, description="as a list, at most 2048 characters together")
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=1024)] | None = None
    ignore_eos: bool | None = False
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(1.0, ge=0.01, le=100)
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=_BIASED), BeforeValidator(_few_tokens)
        ]
        | None
    ) = Field(None, description="token id to what is added to its logit")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    user: str | None = Field(None, description="taken and not used")


class CompletionBody(SamplingBody):
    prompt: Prompt
    max_tokens: int | None = Field(16, ge=0, lt=2**31, description="0 with echo scores the prompt alone")
    echo: bool | None = False
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: Literal[1] | None = Field(None, description="only 1: n draws as many")


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("(text)")]
        | Annotated[list[TextPart], Field(fail_fast=True, max_length=1024), Tag("(list)")],
        Discriminator(_text_or_list, "content_type", "must be a text or a list of parts"),
    ]
    name: str | None = None


class ChatBody(SamplingBody):
    messages: list[Message] = Field(fail_fast=True, min_length=1, max_length=10_000)
    max_tokens: int | None = Field(None, ge=1, lt=2**31, description="default: as many as the model can still read")
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)


class TokenizeBody(Body):
    model: str | None = Field(None, max_length=1000)
    prompt: Text
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    model: str | None = Field(None, max_length=1000)
    tokens: list[TokenId] = Field(fail_fast=True, max_length=1_000_000)


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Logprobs(BaseModel):
    """Of completions. A token without a text of its own is spelled ``token_id:N``."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="where each token begins, counted in the characters of the tokens")


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(BaseModel):
    """A completion, or with ``stream`` one piece of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatToken]
    refusal: None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(BaseModel):
    index: int
    delta: dict[str, str]
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["lowbit"] = "lowbit"
    digest: str = Field(description="of the weights' bytes; answers carry it as system_fingerprint")
    max_model_len: int
    bits_per_weight: float | None
    memory_bytes: int = Field(description="weights, as they lie in memory")
    kv: str = Field(description="how keys and values are kept")
    chat_template: bool


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokenized(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(BaseModel):
    prompt: str


class ModelHealth(BaseModel):
    digest: str
    memory_bytes: int = Field(description="weights, as they lie in memory")
    kv_bytes: int
    waiting: int
    running: int
    slots: int


class Health(BaseModel):
    status: Literal["ok", "stopping", "failed"]
    memory_bytes: int = Field(description="of the whole process")
    models: dict[str, ModelHealth]


class Error(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: Error


def sent(body: BaseModel) -> dict[str, Any]:
    """As JSON is written: fields that are null stay, as OpenAI's client expects them."""
    return body.model_dump(mode="json")


def several(prompt: str | list[Any]) -> list[Any]:
    """The prompts of a completion, each a text or token ids, whichever of the four shapes was sent."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt

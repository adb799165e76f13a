"""What a client may send: the fields of OpenAI's API, vLLM's further ones, and a few of specjax.

Only shapes and ranges are checked here; `translate` makes `requests.Options` of them.
"""

import logging
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specjax.serving.errors import ApiError, wrong

log = logging.getLogger("specjax.serve")

IGNORED = frozenset(
    {
        *("metadata", "store", "service_tier", "reasoning_effort", "verbosity", "safety_identifier", "user"),
        *("prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls", "priority", "modalities"),
        *("spaces_between_special_tokens", "detokenize", "include_reasoning", "documents", "functions"),
    }
)
"""Fields that are taken and have no effect; any other unknown field is named in a warning."""

UNSUPPORTED = {
    "bad_words": "bad_words is not supported: forbid single tokens with logit_bias of -100.",
    "suffix": "suffix is not supported: this server completes text at its end only.",
    "audio": "audio is not supported: this server reads and writes text.",
    "web_search_options": "web_search_options is not supported: this server has no tools of its own.",
    "function_call": "function_call is not supported: give tools and tool_choice, which replaced it.",
    "chat_template": "chat_template is not supported: the server uses its model's own template.",
    "guided_grammar": "guided_grammar is not supported: give guided_regex, guided_choice or guided_json.",
    "logits_processors": "logits_processors are not supported: give logit_bias.",
    "use_beam_search": "use_beam_search is not supported: specjax.beam_search does it in Python.",
    "prompt_embeds": "prompt_embeds is not supported: give a prompt.",
}
"""Fields that would change the answer and that this server lacks: they are refused, not passed over."""

MAX_NAME = 64
"""The longest name of a tool or schema, in characters (OpenAI's bound)."""

Number = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Count = Annotated[int, Field(ge=0, lt=2**31)]


class Part(BaseModel):
    """A part of a message; only text is read."""

    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class StreamOptions(BaseModel):
    """What a stream tells besides text."""

    model_config = ConfigDict(extra="allow")
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None
    include_drafts: bool | None = Field(None, description="specjax: mark the text that came from accepted drafts.")


class JsonSchema(BaseModel):
    """OpenAI's `response_format.json_schema`."""

    model_config = ConfigDict(extra="allow")
    name: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form that the answer must have."""

    model_config = ConfigDict(extra="allow")
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """vLLM's constraints, one of them at a time."""

    model_config = ConfigDict(extra="allow")
    json_: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None
    grammar: str | None = None
    structural_tag: Any = None


class Prediction(BaseModel):
    """OpenAI's predicted output: text that the answer is likely to resemble."""

    model_config = ConfigDict(extra="allow")
    type: Literal["content"]
    content: str | list[Part]


class Common(BaseModel):
    """Fields of both endpoints."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    model: str | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    response_format: ResponseFormat | None = None
    prediction: Prediction | None = None
    # vLLM's.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    stop_token_ids: list[TokenId] | None = None
    allowed_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    request_id: Annotated[str, Field(max_length=200)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    add_special_tokens: bool | None = None
    echo: bool | None = None
    # specjax's, with the meanings that `specjax.generate` gives them.
    typical_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    epsilon_cutoff: Annotated[Number, Field(ge=0, lt=1)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=1024)] | None = None


class ChatRequest(Common):
    """The body of POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class CompletionRequest(Common):
    """The body of POST /v1/completions."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    best_of: Annotated[int, Field(ge=1, le=1024)] | None = None
    logprobs: Annotated[int, Field(ge=-1, le=20)] | None = None


class TokenizeRequest(BaseModel):
    """The body of POST /tokenize: a prompt or messages."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """The body of POST /detokenize."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    tokens: list[TokenId]


_warned: set[str] = set()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _explain(error: ValidationError) -> ApiError:
    """The first thing that is wrong, with the field's path and the value."""
    errors = error.errors(include_url=False, include_context=False)
    first = errors[0]
    # A field of several types reports a line for each of them, with the type's name in its path.
    path = [str(part) for part in first["loc"]]
    names = [part for part in path if part.isidentifier() or part.isdigit()]
    param = ".".join(names) or None
    same = [line["msg"] for line in errors if line["loc"][:1] == first["loc"][:1]]
    message = "; or ".join(dict.fromkeys(same))[:500]
    if first["type"] == "missing":
        return wrong(param, f"{param} is missing: the request needs it.", "missing_required_parameter")
    given = "" if len(same) > 1 and isinstance(first["input"], dict) else f", and it is {_shown(first['input'])}"
    return wrong(param, f"{param or 'The body'}: {message}{given}.", "invalid_value")


def parse(kind: type[BaseModel], body: Any) -> tuple[Any, Sequence[str]]:
    """Reads the body of a request.

    Args:
      kind: one of the classes above.
      body: parsed JSON.

    Returns:
      the request, and the names of fields that nobody knows.

    Raises:
      ApiError: for a body that is no object, wrong fields, and those of `UNSUPPORTED`.
    """
    if not isinstance(body, dict):
        raise wrong(None, f"The body is {_shown(body)}: send a JSON object.", "invalid_body")
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        raise _explain(error) from None
    extra = request.model_extra or {}
    for name, reason in UNSUPPORTED.items():
        if extra.get(name) not in (None, "", [], {}, False):
            raise wrong(name, reason, "unsupported_parameter")
    unknown = sorted(name for name in extra if name not in IGNORED and name not in UNSUPPORTED)
    for name in unknown:
        if len(_warned) < 1000 and name not in _warned:
            _warned.add(name)
            log.warning("unknown field %s in a request: it has no effect", _shown(name))
    return request, unknown

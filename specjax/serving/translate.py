"""From a request of the API to what the engine is asked: prompts as token ids, and options."""

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from specjax.serving import tools as tool_calls
from specjax.serving.constraints import Grammars
from specjax.serving.errors import wrong
from specjax.serving.openai import ChatRequest, Common, CompletionRequest, Message, Part, TokenizeRequest
from specjax.serving.requests import Options
from specjax.text.tokenizer import Tokenizer
from specjax.types import Automaton

RESERVED = frozenset(
    {
        *("messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "return_assistant_tokens_mask", "tokenize"),
    }
)
"""Names that `chat_template_kwargs` may not give, since the server gives them itself."""


class Limits(NamedTuple):
    """What one request may ask for.

    Attributes:
      n: the most sequences of a prompt.
      prompts: the most prompts of a request.
      sequences: the most sequences of a request, of all its prompts together.
      stops: the most stop strings, and stop tokens.
      stop_length: the longest stop string, in characters.
      bias: the most tokens of `logit_bias`, and of `allowed_token_ids`.
      grammar_bytes: the longest schema or expression, in bytes.
      messages: the most messages of a conversation.
      prediction: the most tokens of a predicted output; what is beyond is not looked up.
    """

    n: int = 16
    prompts: int = 256
    sequences: int = 256
    stops: int = 16
    stop_length: int = 256
    bias: int = 300
    grammar_bytes: int = 2**16
    messages: int = 4096
    prediction: int = 512


class Facts(NamedTuple):
    """What translation needs to know of the server.

    Attributes:
      tokenizer: of the target.
      vocab_size: V, of the target.
      max_len: the longest sequence, prompt included, in tokens.
      limits: of a request.
      grammars: those that have been compiled.
    """

    tokenizer: Tokenizer
    vocab_size: int
    max_len: int
    limits: Limits
    grammars: Grammars


class Plan(NamedTuple):
    """What one HTTP request asks of the engine.

    Attributes:
      prompts: token ids of each prompt.
      options: of each prompt.
      echo: the text of each prompt that the answer begins with; empty: none.
      logprobs: how many alternatives the answer lists for each token; None: no log-probabilities.
      answer: whether new tokens are part of the answer; with echo and max_tokens=0 they are not.
      tools: what the model may call.
      prompt_logprobs: how many alternatives vLLM's `prompt_logprobs` lists; None: not asked for.
    """

    prompts: tuple[list[int], ...]
    options: tuple[Options, ...]
    echo: tuple[str, ...] = ()
    logprobs: int | None = None
    answer: bool = True
    tools: tool_calls.Tools = tool_calls.NO_TOOLS
    prompt_logprobs: int | None = None

    @property
    def n(self) -> int:
        """Sequences of each prompt."""
        return self.options[0].n


def text_of(content: str | Sequence[Part] | None, param: str) -> str:
    """The text of a message, whose parts are joined by line breaks.

    Raises:
      ApiError: for parts that are no text.
    """
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in ("text", "input_text", "output_text", "refusal") or part.text is None:
            raise wrong(param, f"{param} has a part of type {part.type!r}: this model reads only text.")
    return "\n".join(part.text or "" for part in content)


def _message(message: Message, param: str) -> dict[str, Any]:
    out: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    out["content"] = text_of(message.content, f"{param}.content")
    if message.name is not None:
        out["name"] = message.name
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        out["tool_calls"] = [_past_call(call, f"{param}.tool_calls.{i}") for i, call in enumerate(message.tool_calls)]
    return out


def _past_call(call: Mapping[str, Any], param: str) -> dict[str, Any]:
    """An earlier call; templates read its arguments as an object, where clients send text."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise wrong(param, f"{param} has no function with a name: send calls as they were answered.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise wrong(
                param, f"{param}.function.arguments is not JSON ({error}): send it as it was answered."
            ) from error
    return {**call, "function": {**function, "arguments": arguments}}


def conversation(
    facts: Facts, request: ChatRequest | TokenizeRequest, tools: tool_calls.Tools = tool_calls.NO_TOOLS
) -> list[int]:
    """Token ids of a conversation, by the chat template.

    Raises:
      ApiError: for messages that the template does not take, and tools where it has none.
    """
    tokenizer, messages = facts.tokenizer, request.messages or []
    if not messages:
        raise wrong("messages", "messages is empty: send at least one message.")
    if len(messages) > facts.limits.messages:
        raise wrong("messages", f"There are {len(messages)} messages, and at most {facts.limits.messages} are taken.")
    if not tokenizer.has_chat_template:
        raise wrong("messages", "This model has no chat template: use /v1/completions with a plain prompt.")
    if tools.listed and not tokenizer.has_tools:
        raise wrong(
            "tools", "The chat template of this model has no tools: leave tools out, or serve a model with tools."
        )
    variables = request.chat_template_kwargs or {}
    if reserved := sorted(RESERVED.intersection(variables)):
        raise wrong("chat_template_kwargs", f"chat_template_kwargs may not give {', '.join(reserved)}: leave that out.")
    if request.continue_final_message and request.add_generation_prompt:
        raise wrong(
            "continue_final_message", "continue_final_message excludes add_generation_prompt: give one of them."
        )
    turns = [_message(message, f"messages.{i}") for i, message in enumerate(messages)]
    try:
        return tokenizer.chat(
            turns,
            tools=list(tools.listed) or None,
            variables=variables,
            continue_final=bool(request.continue_final_message),
            add_generation_prompt=request.add_generation_prompt is not False,
        )
    except ValueError as error:
        raise wrong("messages", str(error)) from error


def encode(facts: Facts, text: str, param: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text.

    Raises:
      ApiError: for a text that is not Unicode.
    """
    try:
        return facts.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except ValueError as error:
        raise wrong(param, f"{param}: {error}") from error


def _fit(facts: Facts, request: Common, prompt: list[int], param: str) -> list[int]:
    """The prompt as it is read: not empty, of known tokens, cut where that is asked for, and not too long."""
    if request.truncate_prompt_tokens is not None and request.truncate_prompt_tokens != 0:
        keep = facts.max_len - 1 if request.truncate_prompt_tokens < 0 else request.truncate_prompt_tokens
        prompt = prompt[-keep:]
    if not prompt:
        raise wrong(param, f"{param} has no tokens: give a text that is not empty.")
    if max(prompt) >= facts.vocab_size:
        raise wrong(param, f"{param} has the token {max(prompt)}: ids are 0 to {facts.vocab_size - 1}.")
    if len(prompt) >= facts.max_len:
        raise wrong(
            param,
            f"{param} has {len(prompt)} tokens, and this server holds {facts.max_len} tokens of prompt and answer "
            "together: shorten it.",
            "context_length_exceeded",
        )
    return prompt


def _max_new(facts: Facts, request: Common, asked: int | None, longest: int, default: int | None) -> int:
    room = facts.max_len - longest
    if asked is None:
        return room if default is None else min(default, room)
    if asked > room:
        raise wrong(
            "max_tokens",
            f"The prompt has {longest} tokens and max_tokens is {asked}, but this server holds {facts.max_len} "
            f"together: lower max_tokens to {room}, or shorten the prompt.",
            "context_length_exceeded",
        )
    return asked


def _stops(facts: Facts, request: Common) -> dict[str, Any]:
    """The options that end a sequence."""
    limits = facts.limits
    strings = [request.stop] if isinstance(request.stop, str) else request.stop or []
    strings = [text for text in strings if text]  # An empty one stops nothing; clients send it for none.
    tokens = request.stop_token_ids or []
    if max(len(strings), len(tokens)) > limits.stops:
        raise wrong("stop", f"There are {max(len(strings), len(tokens))} stops, and at most {limits.stops} are taken.")
    if any(len(text) > limits.stop_length for text in strings):
        raise wrong("stop", f"A stop string is longer than {limits.stop_length} characters: shorten it.")
    if tokens and max(tokens) >= facts.vocab_size:
        raise wrong("stop_token_ids", f"stop_token_ids has {max(tokens)}: ids are 0 to {facts.vocab_size - 1}.")
    own = () if request.ignore_eos else facts.tokenizer.eos_token_ids
    return {
        "stop_tokens": tuple(dict.fromkeys([*own, *tokens])),
        "stop_strings": tuple(strings),
        "include_stop": bool(request.include_stop_str_in_output),
    }


def _bias(facts: Facts, request: Common) -> dict[int, float] | None:
    if not request.logit_bias:
        return None
    if len(request.logit_bias) > facts.limits.bias:
        raise wrong("logit_bias", f"logit_bias has {len(request.logit_bias)} tokens, more than {facts.limits.bias}.")
    found: dict[int, float] = {}
    for name, value in request.logit_bias.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < facts.vocab_size):
            raise wrong(
                "logit_bias", f"logit_bias has the key {name[:40]!r}: give token ids of 0 to {facts.vocab_size - 1}."
            )
        # -100 and 100 are OpenAI's words for "never" and "only this one".
        found[int(name)] = float("-inf") if value <= -100 else value
    return found


def _prediction(facts: Facts, request: Common) -> tuple[int, ...] | None:
    if request.prediction is None:
        return None
    text = text_of(request.prediction.content, "prediction.content")
    return tuple(encode(facts, text, "prediction.content", False)[: facts.limits.prediction]) or None


def _seed(request: Common) -> int:
    """In [0, 2^32), with room for the seeds of all n sequences."""
    most = 2**32 - (request.n or 1) + 1
    return secrets.randbelow(most) if request.seed is None else request.seed % most


def _sampling(request: Common) -> dict[str, Any]:
    """The options that change the distribution, with OpenAI's defaults."""
    temperature = 1.0 if request.temperature is None else request.temperature
    top_p = 1.0 if request.top_p is None else request.top_p
    given = {
        "min_p": request.min_p,
        "typical_p": request.typical_p,
        "epsilon_cutoff": request.epsilon_cutoff,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "no_repeat_ngram_size": request.no_repeat_ngram_size,
        "min_new_tokens": request.min_tokens,
    }
    return {
        # The smallest nucleus is the most probable token.
        "temperature": 0.0 if top_p == 0 else temperature,
        "top_p": top_p or 1.0,
        "top_k": max(request.top_k or 0, 0),
        **{name: value for name, value in given.items() if value is not None},
    }


def _check(facts: Facts, request: Common, num_prompts: int) -> None:
    n, limits = request.n or 1, facts.limits
    if n > limits.n:
        raise wrong("n", f"n is {n}, and at most {limits.n} sequences of a prompt are taken: send several requests.")
    if num_prompts > limits.prompts or n * num_prompts > limits.sequences:
        raise wrong(
            "prompt",
            f"The request asks for {n} sequences of {num_prompts} prompts: at most {limits.prompts} prompts and "
            f"{limits.sequences} sequences are taken.",
        )
    if request.stream_options is not None and not request.stream:
        raise wrong("stream_options", "stream_options is only for streams: set stream to true, or leave it out.")
    if request.skip_special_tokens is False:
        raise wrong("skip_special_tokens", "skip_special_tokens=false is not supported: set return_token_ids.")
    if request.prompt_logprobs is not None and request.stream:
        raise wrong("prompt_logprobs", "prompt_logprobs is not for streams: set stream to false.")


def _options(
    facts: Facts,
    request: Common,
    grammar: Automaton | None,
    max_new: int,
    salt: str,
    logprobs: Mapping[str, Any],
) -> Options:
    if grammar is not None and request.ignore_eos and request.allowed_token_ids is None:
        raise wrong("ignore_eos", "ignore_eos excludes grammars, which end with a stop token: leave one of them out.")
    if (request.min_tokens or 0) > max_new:
        raise wrong("min_tokens", f"min_tokens is {request.min_tokens}, more than the {max_new} tokens of the answer.")
    return Options(
        max_new_tokens=max_new,
        n=request.n or 1,
        seed=_seed(request),
        logit_bias=_bias(facts, request),
        grammar=grammar,
        prediction=_prediction(facts, request),
        cache_salt=f"{salt}:{request.cache_salt or ''}",
        **_sampling(request),
        **_stops(facts, request),
        **logprobs,
    )


def chat(facts: Facts, request: ChatRequest, salt: str = "") -> Plan:
    """What a chat request asks for. Blocks while a template is rendered or a grammar compiled.

    Args:
      facts: of the server.
      request: the request.
      salt: keeps the cached prefixes of one API key from another's.

    Raises:
      ApiError: for a request that makes no sense.
    """
    _check(facts, request, 1)
    if request.echo:
        raise wrong("echo", "echo is not supported for chats: use /v1/completions.")
    if request.top_logprobs is not None and not request.logprobs:
        raise wrong("top_logprobs", "top_logprobs needs logprobs: set logprobs to true.")
    tools = tool_calls.read(request.tools, request.tool_choice)
    grammar = facts.grammars.of(request)
    if (schema := tools.schema()) is not None:
        if grammar is not None:
            raise wrong("tool_choice", "tool_choice excludes response_format and other grammars: give one of them.")
        grammar = facts.grammars.schema(schema, "tools")
    prompt = _fit(facts, request, conversation(facts, request, tools), "messages")
    asked = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    if asked == 0:
        raise wrong("max_completion_tokens", "max_completion_tokens is 0: give at least 1.")
    max_new = _max_new(facts, request, asked, len(prompt), None)
    top = (request.top_logprobs or 0) if request.logprobs else None
    logprobs: dict[str, Any] = {"logprobs": top, "prompt_logprobs": request.prompt_logprobs}
    options = _options(facts, request, grammar, max_new, salt, logprobs)
    return Plan((prompt,), (options,), (), top, True, tools, request.prompt_logprobs)


DEFAULT_MAX_TOKENS = 16
"""Of completions, as OpenAI has it."""


def prompts_of(facts: Facts, request: CompletionRequest) -> list[tuple[list[int], str]]:
    """The token ids and the text of each prompt.

    Raises:
      ApiError: for an empty list, and prompts that are empty, too long or of unknown tokens.
    """
    given = request.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise wrong("prompt", "prompt is an empty list: give at least one prompt.")
    if len(given) > facts.limits.prompts:
        raise wrong("prompt", f"There are {len(given)} prompts, and at most {facts.limits.prompts} are taken.")
    found = []
    for i, one in enumerate(given):
        param = "prompt" if len(given) == 1 else f"prompt.{i}"
        is_text = isinstance(one, str)
        ids = encode(facts, one, param, request.add_special_tokens is not False) if isinstance(one, str) else list(one)  # type: ignore[arg-type]
        ids = _fit(facts, request, ids, param)
        whole = is_text and not request.truncate_prompt_tokens
        found.append((ids, str(one) if whole else facts.tokenizer.decode(ids) if request.echo else ""))
    return found


def completion(facts: Facts, request: CompletionRequest, salt: str = "") -> Plan:
    """What a completion request asks for. Blocks while prompts are tokenised or a grammar compiled.

    Args:
      facts: of the server.
      request: the request.
      salt: keeps the cached prefixes of one API key from another's.

    Raises:
      ApiError: for a request that makes no sense.
    """
    prompts = prompts_of(facts, request)
    _check(facts, request, len(prompts))
    if request.best_of not in (None, request.n or 1):
        raise wrong("best_of", f"best_of is {request.best_of}: only that of n is supported; ask for n and choose.")
    if request.logprobs == -1:
        raise wrong("logprobs", "logprobs=-1, the whole vocabulary, is not supported: give 0 to 20.")
    only_echo = request.max_tokens == 0
    if only_echo and not request.echo:
        raise wrong("max_tokens", "max_tokens is 0: give at least 1, or set echo.")
    longest = max(len(ids) for ids, _ in prompts)
    max_new = 1 if only_echo else _max_new(facts, request, request.max_tokens, longest, DEFAULT_MAX_TOKENS)
    of_prompt = request.logprobs if request.echo else None
    if request.prompt_logprobs is not None:
        of_prompt = max(of_prompt or 0, request.prompt_logprobs)
    grammar = facts.grammars.of(request)
    logprobs: dict[str, Any] = {"logprobs": request.logprobs, "prompt_logprobs": of_prompt}
    options = tuple(_options(facts, request, grammar, max_new, salt, logprobs) for _ in prompts)
    return Plan(
        tuple(ids for ids, _ in prompts),
        options,
        tuple(text for _, text in prompts) if request.echo else (),
        request.logprobs,
        not only_echo,
        prompt_logprobs=request.prompt_logprobs,
    )

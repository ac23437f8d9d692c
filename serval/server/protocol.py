"""Request bodies of the OpenAI API, with vLLM's extra sampling fields.

Unknown fields are refused by name, so that a misspelt option is never silently ignored. Fields of
OpenAI's API that have no meaning here (`user`, `store`, ...) are accepted and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

MAX_CHOICES = 128
MAX_LOGPROBS = 20

INT64 = 2**63 - 1


def _whole(value: Any) -> Any:
    """JSON does not tell 1 from 1.0, so neither do we; 1.5 stays and fails validation."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= INT64:
        return int(value)
    return value


Int = Annotated[int, BeforeValidator(_whole)]
TokenId = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=2**31 - 1)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Model = Annotated[str, StringConstraints(max_length=512)]


class Strict(BaseModel):
    """A JSON object with exactly the declared fields and types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredOutputs(Strict):
    """vLLM's constrained output: exactly one of the fields."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"maxProperties": 1})

    json_schema: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = Field(None, max_length=10_000)
    choice: list[Annotated[str, StringConstraints(min_length=1)]] | None = Field(
        None, min_length=1, max_length=1000
    )


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchema(Strict):
    name: Annotated[str, StringConstraints(max_length=256)] = "answer"
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class Generation(Strict):
    """Fields that completions and chat completions share."""

    model: Model | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: Int | None = Field(None, ge=-INT64, le=INT64)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=1024
    )
    response_format: ResponseFormat | None = None

    # Beyond OpenAI, as in vLLM.
    top_k: Int | None = Field(None, ge=-1, le=INT64)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    min_tokens: Int | None = Field(None, ge=0, le=INT64)
    stop_token_ids: list[TokenId] | None = Field(None, max_length=1024)
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None

    # OpenAI's fields without meaning here, accepted and ignored.
    user: Any = None


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=2048)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=2048),
        ]
    )
    max_tokens: Int | None = Field(None, ge=1, le=INT64, description="16 when left out.")
    logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    add_special_tokens: bool | None = None
    best_of: Int | None = Field(None, ge=1, description="Not supported beyond `n`.")
    suffix: str | None = Field(None, description="Not supported.")


class FunctionCall(BaseModel):
    """A call the model made earlier; `arguments` is JSON text."""

    name: str
    arguments: str = "{}"


class ToolCall(BaseModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ContentPart(BaseModel):
    """One part of a message; only text can be read."""

    model_config = ConfigDict(extra="allow")

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    """One message; fields a client copies from earlier answers are kept for the template."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class FunctionSpec(BaseModel):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class ChatCompletionRequest(Generation):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: Int | None = Field(None, ge=1, le=INT64)
    max_completion_tokens: Int | None = Field(None, ge=1, le=INT64)
    logprobs: bool | None = None
    top_logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    # OpenAI's fields without meaning here, accepted and ignored.
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None


class TokenizeRequest(Strict):
    """POST /tokenize: text (`prompt`) or a conversation (`messages`)."""

    model: Model | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: list[Tool] | None = Field(None, max_length=128)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: Model | None = None
    tokens: list[TokenId]

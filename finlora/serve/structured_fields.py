"""Fields of a request that ask for structured output: OpenAI's response_format and tools, and vLLM's structured_outputs.

Source: https://platform.openai.com/docs/api-reference/chat/create and
https://docs.vllm.ai/en/latest/features/structured_outputs.html.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from finlora.serve.wire_object import WireObject

_MAX_CHOICES, _MAX_TOOLS = 1000, 128
_Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
_Schema = dict[str, Any]
_Choices = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True, min_length=1, max_length=_MAX_CHOICES)
]


class _Fields(WireObject):
    model_config = ConfigDict(populate_by_name=True)


class SchemaFormat(_Fields):
    name: _Name = Field(description="Name of the schema.")
    description: str | None = Field(None, description="Ignored: say in a message what the answer is for.")
    content: _Schema = Field(alias="schema", description="JSON Schema of the answer.")
    strict: bool | None = Field(None, description="Ignored: the schema is always followed.")


class ResponseFormat(_Fields):
    type: Literal["text", "json_object", "json_schema"] = Field(description="`text`: no grammar.")
    json_schema: SchemaFormat | None = Field(None, description="Only with the type `json_schema`.")
    content: _Schema | None = Field(
        None,
        alias="schema",
        description="Only with the type `json_object`: JSON Schema of the object, as instructor sends it.",
    )

    @property
    def wanted(self) -> _Schema | None:
        """JSON Schema of the answer; None: any text."""
        if self.json_schema is not None:
            return self.json_schema.content
        return self.content or ({"type": "object"} if self.type == "json_object" else None)

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("expected json_schema with the type json_schema, and only there")
        if self.content is not None and self.type != "json_object":
            raise ValueError(
                "schema belongs to the type json_object: send json_schema.schema with the type json_schema"
            )
        return self


class StructuredOutputs(_Fields):
    """Exactly one of its fields."""

    schema_of_json: _Schema | str | None = Field(
        None, alias="json", description="JSON Schema of the answer, or its text."
    )
    regex: str | None = Field(None, min_length=1, description="Regular expression of the whole answer.")
    choice: _Choices | None = Field(None, description="Texts, of which the answer is one.")
    json_object: bool | None = Field(None, description="true: any JSON object.")

    @model_validator(mode="before")
    @classmethod
    def _check_kind(cls, values: Any) -> Any:
        if isinstance(values, dict) and (other := {"grammar", "structural_tag"} & {k for k, v in values.items() if v}):
            raise ValueError(f"{min(other)} is not offered: expected json, regex, choice or json_object")
        return values

    @model_validator(mode="after")
    def _check_one(self) -> StructuredOutputs:
        given = [self.schema_of_json, self.regex, self.choice, self.json_object or None]
        if sum(value is not None for value in given) != 1:
            raise ValueError("expected exactly one of json, regex, choice and json_object")
        return self


class StructuredFields(BaseModel):
    """Fields of chat and text completions. At most one may ask for something."""

    response_format: ResponseFormat | None = Field(
        None, description="`json_object`: the answer is a JSON object. `json_schema`: it fits a JSON Schema."
    )
    structured_outputs: StructuredOutputs | None = Field(
        None,
        description="vLLM's field: the answer fits a JSON Schema or a regular expression, or is one of some texts.",
    )
    guided_json: _Schema | str | None = Field(None, description="vLLM's older field for `structured_outputs.json`.")
    guided_regex: str | None = Field(None, description="vLLM's older field for `structured_outputs.regex`.")
    guided_choice: _Choices | None = Field(None, description="vLLM's older field for `structured_outputs.choice`.")


class Function(_Fields):
    name: _Name = Field(description="Name of the function.")
    description: str | None = Field(None, description="What it does, for the model.")
    parameters: _Schema | None = Field(
        None, description="JSON Schema of its arguments, an object. null: it takes none."
    )
    strict: bool | None = Field(None, description="Ignored: the schema is always followed.")


class Tool(_Fields):
    type: Literal["function"] = Field(description="Only functions.")
    function: Function = Field(description="Function that the caller offers.")


class FunctionName(_Fields):
    name: _Name = Field(description="Name of one of `tools`.")


class NamedTool(_Fields):
    type: Literal["function"] = Field(description="Only functions.")
    function: FunctionName = Field(description="Function to call.")


class ToolFields(BaseModel):
    """Fields of chat completions."""

    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=_MAX_TOOLS)] | None = Field(
        None, description="Functions that the answer may call. The prompt describes them in a system message."
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None,
        description="`auto`, the default: the answer is text, or calls. `required`: it is one call or more. A function: it "
        "is one call of that function. `none`: as without `tools`.",
    )
    parallel_tool_calls: bool | None = Field(
        None, description="false: at most one call. Default: several calls may follow."
    )

    @property
    def offered_tools(self) -> list[Function]:
        """Functions that the answer may call."""
        functions = [tool.function for tool in self.tools or ()]
        if self.tool_choice == "none":
            return []
        return [function for function in functions if self.named_tool in (None, function.name)]

    @property
    def named_tool(self) -> str | None:
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @model_validator(mode="after")
    def _check_tools(self) -> ToolFields:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools holds two functions of one name")
        if self.named_tool is not None and self.named_tool not in names:
            raise ValueError(f"tool_choice names {self.named_tool!r}, which is not among tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is `required`, but tools is empty")
        return self

"""What the Hub reads in a README.md: its metadata, whether they are valid, and the tags they make.

The rules are those of the Hub's documentation that a model card may well break. The Hub has more of them.
"""

import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

# As in the Hub's server, which is why `---` must stand alone.
_FRONT_MATTER = re.compile(r"^\s*---(?:\r\n|\r|\n)([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")
_PIPELINE_TAGS = """
    any-to-any audio-classification audio-text-to-text audio-to-audio automatic-speech-recognition
    depth-estimation document-question-answering feature-extraction fill-mask graph-ml image-classification
    image-feature-extraction image-segmentation image-text-to-text image-to-3d image-to-image image-to-text
    image-to-video keypoint-detection keypoint-matching mask-generation multiple-choice object-detection other
    question-answering reinforcement-learning robotics sentence-similarity summarization
    table-question-answering table-to-text tabular-classification tabular-regression tabular-to-text
    text-classification text-generation text-ranking text-retrieval text-to-3d text-to-audio text-to-image
    text-to-speech text-to-video text2text-generation time-series-forecasting token-classification translation
    unconditional-image-generation video-classification video-text-to-text visual-document-retrieval
    visual-question-answering voice-activity-detection zero-shot-audio-classification
    zero-shot-classification zero-shot-image-classification zero-shot-object-detection
"""


def _pipeline_tag(tag: str) -> str:
    known = _PIPELINE_TAGS.split()
    if tag not in known:
        raise ValueError(f"must be one of [{', '.join(known)}]")
    return tag


def _given(value: Any) -> Any:
    if value is None:
        raise ValueError("is required")
    return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_Strings = Annotated[list[str], BeforeValidator(_as_list)]
_Language = Annotated[str, Field(pattern=r"^([a-z]{2,3}|code|multilingual)$")]
_RepoId = Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")]


class _Task(BaseModel):
    type: str
    name: str = ""


class _Dataset(BaseModel):
    name: str
    type: str
    config: str = ""
    split: str = ""
    revision: str = ""


class _Metric(BaseModel):
    type: str
    value: Annotated[Any, AfterValidator(_given)]
    name: str = ""


class _Result(BaseModel):
    task: _Task
    dataset: _Dataset
    metrics: list[_Metric]


class _EvaluatedModel(BaseModel):
    name: str
    results: list[_Result]


class _Card(BaseModel):
    """What any card may not get wrong."""

    license: _Strings = []
    language: Annotated[list[_Language], BeforeValidator(_as_list)] = []
    tags: list[str] = []


class _ModelCard(_Card):
    model_config = ConfigDict(protected_namespaces=())

    base_model: Annotated[list[_RepoId], BeforeValidator(_as_list)] = []
    base_model_relation: Literal["adapter", "merge", "quantized", "finetune"] = "finetune"
    datasets: _Strings = []
    metrics: _Strings = []
    library_name: str = ""
    pipeline_tag: Annotated[str, AfterValidator(_pipeline_tag)] = "other"
    model_index: list[_EvaluatedModel] = Field([], alias="model-index")


# The Hub's words for what pydantic finds; for the rest pydantic's own do.
_WORDS = {
    "missing": "is required",
    "string_type": "must be a string",
    "list_type": "must be an array",
    "model_type": "must be an object",
    "string_pattern_mismatch": "is not valid",
}


def metadata(text: str) -> dict[str, Any]:
    """The front matter of a card; empty if it has none.

    Raises:
        ValueError: it is not YAML, or not a mapping.
    """
    match = _FRONT_MATTER.match(text)
    if match is None:
        return {}
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ValueError(f"YAML Metadata Error: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError("YAML Metadata Error: the metadata must be a mapping")
    return data


def problems(text: str, repo_type: str) -> list[str]:
    """Everything for which the Hub would reject a card."""
    try:
        data = metadata(text)
        (_ModelCard if repo_type == "model" else _Card).model_validate(data)
    except ValidationError as error:
        return [_describe(problem) for problem in error.errors()]
    except ValueError as error:
        return [str(error)]
    return []


def tags(data: dict[str, Any], files: list[str]) -> list[str]:
    """The tags of a repository: those in its card, and those that other metadata and its files imply."""
    base_models = strings(data.get("base_model"))
    relation = data.get("base_model_relation")
    found = [
        *strings(data.get("library_name")),
        *(["safetensors"] if any(name.endswith(".safetensors") for name in files) else []),
        *strings(data.get("tags")),
        *strings(data.get("pipeline_tag")),
        *(f"dataset:{name}" for name in strings(data.get("datasets"))),
        *(f"base_model:{name}" for name in base_models),
        *(f"base_model:{relation}:{name}" for name in base_models if relation),
        *(f"task_categories:{name}" for name in strings(data.get("task_categories"))),
        *(f"license:{name}" for name in strings(data.get("license"))),
        *strings(data.get("language")),
        *(["model-index"] if "model-index" in data else []),
        "region:us",
    ]
    return list(dict.fromkeys(found))


def strings(value: Any) -> list[str]:
    """A metadata value that may be one string, several or none."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]


def _describe(problem: Any) -> str:
    place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in problem["loc"]).lstrip(".")
    words = _WORDS.get(problem["type"]) or problem["msg"].removeprefix("Value error, ")
    return f'"{place}" {words}'

"""What an operator may set under ``args:`` of a Serve configuration file, and why so."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from config.mistakes import describe_mistakes
from gemma_serve.engine.config import (
    AttentionSetting,
    CacheDType,
    EngineConfig,
    Speculation,
)
from gemma_serve.errors import ConfigurationError
from gemma_serve.gemma.checkpoints import served_name
from gemma_serve.gemma.config import Device, DType, ModelConfig, Quantization
from gemma_serve.images.limits import ImageLimits
from gemma_serve.messages import PromptedToolForm
from gemma_serve.openai_api.config import ApiConfig, ToolPolicy
from gemma_serve.openai_api.limits import ApiLimits

# A secret, so not a setting: files get committed and shown.
API_KEYS_VARIABLE = "GEMMA_SERVE_API_KEYS"

NonEmptyStr = Annotated[str, Field(min_length=1)]
Size = Annotated[ByteSize, Field(gt=0)]
SizeOrZero = Annotated[ByteSize, Field(ge=0)]

_ENGINE = EngineConfig()
_API = ApiLimits()
_PRESENTATION = ApiConfig(model_name="")


class AppSettings(BaseModel):
    """One Gemma 3 behind one OpenAI API.

    A mistake raises one ``ConfigurationError`` that names every wrong setting, so that Serve's log
    shows the sentence and not a stack of pydantic's.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )

    model: NonEmptyStr = "demo"
    """``demo`` and ``demo-vision`` (270M, run anywhere), ``dummy:<size>`` (random weights), a local
    folder, or a Hub id such as ``google/gemma-3-4b-it``."""
    served_model_name: NonEmptyStr | None = None
    """The ``model`` that clients send; by default the checkpoint's name, never a path."""
    revision: NonEmptyStr | None = None
    """Branch, tag or commit of a Hub id, and of nothing else. Pin it where the same answers matter
    next month."""
    dtype: DType = "auto"
    """``auto`` is bfloat16, what Gemma 3 was trained in; ``float32`` doubles the memory."""
    device: Device = "auto"
    """``auto`` is CUDA where a replica has GPUs, otherwise the CPU."""
    quantization: Quantization = "none"
    """Store the decoder layers' matrices in fewer bits; the embedding, the norms and the vision
    tower stay as they are. ``fp8`` halves them on Ada, Hopper and later; ``torchao-int8`` and
    ``bitsandbytes-8bit`` halve them anywhere, but are slower than none; ``torchao-int4`` (Ampere
    and later) and ``bitsandbytes-4bit`` leave about a quarter and cost quality. All but ``fp8``
    need ``pip install 'gemma-serve[quantization]'``. Checkpoints that are quantised already are
    loaded as they are."""

    num_replicas: PositiveInt = 1
    """Copies of the model. Each takes its own requests: throughput grows, latency does not."""
    gpus_per_replica: NonNegativeInt | Literal["auto"] = "auto"
    """GPUs that one copy's layers are spread over; a copy that fits the first one leaves the others
    unused. 0 runs on the CPU. ``auto`` shares the nodes' GPUs equally among the replicas."""
    cpus_per_replica: PositiveFloat = 1.0
    """Cores that Ray reserves for one copy. It places replicas by this and limits nothing, so that
    1 fits a small machine beside the ingress."""
    threads_per_replica: PositiveInt | Literal["auto"] = "auto"
    """Threads that torch computes with on the CPU. ``auto`` shares a node's cores equally among the
    replicas; Ray's own default, ``cpus_per_replica`` rounded down, would leave cores idle."""

    host: NonEmptyStr = "127.0.0.1"
    """Address that the HTTP front ends listen at, if they have a ``port``. ``0.0.0.0`` lets other
    machines in: set API keys first."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Port of the HTTP front ends, each on its own machine; those on one machine share it. Without
    one they stand behind Serve's proxies (``http_options``), which adds to the first token what
    ``docs/decisions/ray-serve.md`` says."""
    num_ingress_replicas: PositiveInt = 1
    """HTTP front ends, each a process that uses one core at most. Add one when that core is busy
    while the model is not."""
    cpus_per_ingress_replica: PositiveFloat = 0.25
    """Cores that Ray reserves for one front end: little, so that it always finds a place."""
    admission_timeout_s: PositiveFloat = 30.0
    """Seconds that a request may wait until a replica takes it, before it gets a 503. It covers a
    replica's restart, not the answer: answers have no deadline."""

    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Tokens of prompt and completion together; by default what the checkpoint was trained for
    (32,768 or 131,072). Where one such chat does not fit the memory for keys and values, start-up
    says how much it needs."""
    max_num_seqs: PositiveInt = _ENGINE.max_num_seqs
    """Sequences computed together. More raise throughput and slow each one down, and each needs
    memory for its keys and values."""
    max_queued_requests: NonNegativeInt = _ENGINE.max_queued_requests
    """Answers per replica that wait for one of those places; more get a 429. 256 is eight
    full batches: beyond, a caller had better try elsewhere."""
    prefill_chunk_size: PositiveInt = _ENGINE.prefill_chunk_size
    """Prompt tokens computed per step. Small keeps running answers smooth while a long prompt comes
    in, large finishes the prompt sooner."""
    max_prefill_slowdown: Annotated[float, Field(gt=1)] | None = None
    """While answers are written, a step that also computes prompts may take so many times as long
    as one that does not, and gets fewer prompt tokens where it would take longer; more where more
    prompts wait than answers are written. By default 1.75 on a GPU and no limit (``.inf``) on a
    CPU, where smooth answers cost throughput: with 32 users 2.0 took the 95th percentile between
    tokens from 0.4 to 0.15 s, and 8 % of the tokens per second."""
    block_size: PositiveInt = _ENGINE.block_size
    """Tokens per block of the KV cache. 16 wastes at most 15 tokens of memory per sequence."""
    kv_cache_memory: Size | None = None
    """Memory per replica for keys and values, such as ``4GiB``. By default 1 GiB on a CPU, or what
    one sequence of ``max_model_len`` tokens needs, and on a GPU all that the largest step, run once
    at start-up, leaves free."""
    kv_cache_dtype: CacheDType = _ENGINE.kv_cache_dtype
    """``fp8`` stores keys and values in 8-bit floating point: twice the chats in the same memory,
    for a little quality. ``auto`` stores them as the model computes them."""
    vision_cache_memory: SizeOrZero | None = None
    """Memory per replica for what the vision tower made of images seen lately, such as ``1GiB``, so
    that it need not look at them again; 0 keeps nothing. By default 256 MiB on a CPU and 1 % of a
    GPU: one of 80 GB remembers about 300 images with 27B, in less memory than a chat's."""

    attention: AttentionSetting = _ENGINE.attention
    """Whose kernels compute attention: ``triton`` (our own), ``varlen`` (torch's FlashAttention,
    over pages), ``native`` (our own for CPUs), ``sdpa`` (torch's, over gathered keys) or
    ``reference`` (slow; to compare with). ``auto`` takes the first of them that passes a trial at
    start-up; the log says which. ``triton`` and ``native`` bring kernels for norms and, with AMX or
    AVX-512 BF16, products too."""
    enforce_eager: bool = _ENGINE.enforce_eager
    """Launch every operation of a decode step from Python instead of replaying CUDA graphs, which
    are recorded at start-up and take memory, and begin no step before the last one's tokens are
    known. Slower on a GPU; a CPU works like that anyway."""

    enable_prefix_cache: bool = _ENGINE.enable_prefix_cache
    """Keep keys and values of answered prompts while memory lasts, so that the next turn of a chat
    and the next user of a long instruction wait only for what is new. Answers stay the same."""
    share_prefix_cache: bool = False
    """Let requests with different API keys share it. Off: by the time that an answer takes, one
    key's holder could find out what another's prompts begin with."""

    speculation: Speculation = _ENGINE.speculation
    """``prompt_lookup`` guesses that an answer goes on as its prompt or itself did after the same
    three tokens, and computes several guesses in one step: edited code and quoted text come several
    times as fast. Texts stay what they were. How often guesses hit and what they cost is measured
    all the time, and where they do not pay none are made. ``off`` also keeps rounding the same
    from run to run on a server with one user."""
    draft_model: NonEmptyStr | None = None
    """A smaller Gemma 3 that guesses, such as ``google/gemma-3-270m-it`` for 4B and up, where
    ``prompt_lookup`` is off or finds nothing; named as ``model`` is. It has the same vocabulary and
    lies on the same devices, with a part of the memory for keys and values. Texts stay what they
    were; chats with images are not guessed. Where its guesses do not pay none are made."""
    num_speculative_tokens: PositiveInt = _ENGINE.num_speculative_tokens
    """Guesses per answer and step, at most. More pay where whole pages are copied."""

    tools: ToolPolicy | None = None
    """What happens to ``tools`` that the model may call or not: ``prompt`` tells it of them,
    ``ignore`` answers in text, ``reject`` is a 400. By default ``prompt`` from 4B on and ``ignore``
    below: smaller models cannot do it. Where a request wants a call for certain, all models are
    told, unless ``reject`` is set."""
    tool_form: PromptedToolForm = "json"
    """How prompts ask for calls: ``json`` objects or ``pythonic`` calls, both of which Google
    documents. Answers are understood in either form."""

    max_body_size: Size = ByteSize(_API.max_body_bytes)
    """Largest HTTP body, such as ``64MiB``; beyond is a 413. The default holds a chat with several
    photos as data URLs."""
    keep_alive_interval_s: PositiveFloat = _PRESENTATION.keep_alive_interval_s
    """Seconds that a stream may be silent, as while a long prompt is read, before it gets a
    comment. Proxies cut connections that are silent for 30 to 60 seconds."""
    response_store_size: Annotated[ByteSize, Field(ge=0)] = ByteSize(
        _PRESENTATION.response_store_bytes
    )
    """Memory per HTTP front end for the responses that ``previous_response_id`` may name, such as
    ``64MiB``: thousands of chats of text. 0 stores none."""
    max_images: NonNegativeInt = _API.images.max_images
    """Images per request. One fills 256 prompt tokens, up to five times that when cropped."""
    max_image_size: Size = ByteSize(_API.images.max_bytes)
    """Encoded size of one image, such as ``20MiB``: any phone's photo passes."""
    max_image_pixels: PositiveInt = _API.images.max_pixels
    """Width times height, read before decoding. Any ordinary photo passes; 25 million pixels decode
    to 75 MB, to 400 MB with transparency."""
    image_fetch_timeout_s: PositiveFloat = _API.images.fetch_timeout_s
    """Seconds to fetch one image URL, redirects included."""
    max_image_redirects: NonNegativeInt = _API.images.max_redirects
    """Redirects followed for one image URL. Each hop's address is checked."""
    allow_private_image_addresses: bool = _API.images.allow_private_addresses
    """Fetch images from loopback, private and link-local addresses. Off: a caller could read your
    internal network through this server."""
    allow_http_images: bool = _API.images.allow_http
    """Fetch images from ``http:`` URLs too. Off: anyone on the way could swap one."""
    require_api_keys: bool = False
    """Refuse to start without keys. Set it in every file whose host is not 127.0.0.1: on a running
    Ray cluster the keys come from the environment of its nodes, not from your shell."""
    cors_allow_origins: tuple[str, ...] = ()
    """Web origins whose pages may call the API from a browser, such as ``https://chat.example``;
    ``*`` is any. None by default: servers and SDKs do not need it."""

    @field_validator("dtype", mode="before")
    @classmethod
    def _explain_float16(cls, value: object) -> object:
        if value in ("float16", "fp16", "half"):
            raise ValueError(
                "Gemma 3's activations overflow float16 and its answers come out empty; "
                "use bfloat16 or float32"
            )
        return value

    @field_validator("gpus_per_replica")
    @classmethod
    def _agree_with_device(
        cls, value: int | Literal["auto"], info: ValidationInfo
    ) -> int | Literal["auto"]:
        device = info.data.get("device")
        if device == "cuda" and value == 0:
            raise ValueError("must be at least 1, or auto, with device: cuda")
        if device == "cpu" and value not in (0, "auto"):
            raise ValueError("must be 0, or auto, with device: cpu")
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _name_every_mistake(cls, args: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        # Not a ValueError, so that pydantic passes it on as it is.
        try:
            return handler(args)
        except ValidationError as error:
            raise ConfigurationError(
                describe_mistakes(
                    error,
                    known=cls.model_fields,
                    elsewhere={
                        "api_keys": f"keys come from the environment, {API_KEYS_VARIABLE}",
                    },
                )
            ) from None

    @property
    def model_name(self) -> str:
        """The name that clients send."""
        return self.served_model_name or served_name(self.model)

    def to_model_config(self, device: Device) -> ModelConfig:
        """``device``: where the replicas were placed, when the settings leave it open."""
        return ModelConfig(
            model=self.model,
            revision=self.revision,
            dtype=self.dtype,
            device=device,
            quantization=self.quantization,
        )

    def to_engine_config(self) -> EngineConfig:
        return EngineConfig(
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_queued_requests=self.max_queued_requests,
            prefill_chunk_size=self.prefill_chunk_size,
            max_prefill_slowdown=self.max_prefill_slowdown,
            block_size=self.block_size,
            kv_cache_memory_bytes=None
            if self.kv_cache_memory is None
            else int(self.kv_cache_memory),
            kv_cache_dtype=self.kv_cache_dtype,
            vision_cache_memory_bytes=None
            if self.vision_cache_memory is None
            else int(self.vision_cache_memory),
            attention=self.attention,
            enforce_eager=self.enforce_eager,
            enable_prefix_cache=self.enable_prefix_cache,
            speculation=self.speculation,
            draft_model=self.draft_model,
            num_speculative_tokens=self.num_speculative_tokens,
        )

    def to_api_config(self, api_keys: tuple[str, ...]) -> ApiConfig:
        """``api_keys``: whoever sends one of them is let in; everyone, if there are none.

        Raises ``ConfigurationError`` if there are none but ``require_api_keys`` is set.
        """
        if self.require_api_keys and not api_keys:
            raise ConfigurationError(
                f"require_api_keys is set, but there are no keys in {API_KEYS_VARIABLE}; on a "
                "running Ray cluster, set it for `ray start` on every node"
            )
        images = ImageLimits(
            max_images=self.max_images,
            max_bytes=int(self.max_image_size),
            max_pixels=self.max_image_pixels,
            fetch_timeout_s=self.image_fetch_timeout_s,
            max_redirects=self.max_image_redirects,
            allow_private_addresses=self.allow_private_image_addresses,
            allow_http=self.allow_http_images,
        )
        return ApiConfig(
            model_name=self.model_name,
            api_keys=api_keys,
            cors_allow_origins=self.cors_allow_origins,
            share_prefix_cache=self.share_prefix_cache,
            keep_alive_interval_s=self.keep_alive_interval_s,
            response_store_bytes=int(self.response_store_size),
            tools=self.tools,
            tool_form=self.tool_form,
            limits=ApiLimits(max_body_bytes=int(self.max_body_size), images=images),
        )


def parse_api_keys(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The comma-separated keys in ``GEMMA_SERVE_API_KEYS``; unset or empty: none is asked for."""
    value = environment.get(API_KEYS_VARIABLE, "")
    keys = tuple(key for part in value.split(",") if (key := part.strip()))
    if value and not keys:
        raise ConfigurationError(f"{API_KEYS_VARIABLE} is set, but holds no key; unset it for none")
    return keys

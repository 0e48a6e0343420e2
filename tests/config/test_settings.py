import math

import pytest

from config.settings import AppSettings, parse_api_keys
from gemma_serve.engine.config import EngineConfig
from gemma_serve.errors import ConfigurationError
from gemma_serve.openai_api.config import ApiConfig


def mistakes_of(args: object) -> list[str]:
    """The lines under the heading of the error that ``args`` cause."""
    with pytest.raises(ConfigurationError) as caught:
        AppSettings.model_validate(args)
    heading, *lines = str(caught.value).splitlines()
    assert heading == "These settings under args: cannot work (config/settings.py explains each):"
    return [line.strip() for line in lines]


def test_no_settings_at_all_serve_the_demo_with_the_engines_and_apis_own_defaults() -> None:
    settings = AppSettings()
    assert settings.model == "demo"
    assert settings.to_engine_config() == EngineConfig()
    assert settings.to_api_config(()) == ApiConfig(model_name=settings.model_name)


def test_tools_are_left_to_the_models_size_unless_set() -> None:
    default = AppSettings().to_api_config(())
    assert (default.tools, default.tool_form) == (None, "json")
    changed = AppSettings(tools="reject", tool_form="pythonic").to_api_config(())
    assert (changed.tools, changed.tool_form) == ("reject", "pythonic")


def test_every_setting_is_explained() -> None:
    unexplained = [
        name for name, field in AppSettings.model_fields.items() if not field.description
    ]
    assert unexplained == []


def test_all_mistakes_are_named_at_once() -> None:
    assert mistakes_of({"max_num_seq": 4, "block_size": 0, "dtype": "int8"}) == [
        "dtype: should be 'auto', 'bfloat16' or 'float32', got 'int8'",
        "block_size: should be greater than 0, got 0",
        "max_num_seq: there is no such setting; did you mean max_num_seqs?",
    ]


def test_setting_of_several_types_says_all_that_it_may_be() -> None:
    assert mistakes_of({"gpus_per_replica": "two"}) == [
        "gpus_per_replica: should be a valid integer, unable to parse string as an integer "
        "or should be 'auto', got 'two'"
    ]


def test_float16_is_refused_with_the_reason() -> None:
    """vllm#14817, vllm#18733, mlx-lm#28: empty answers, or ``<pad>`` for ever."""
    assert mistakes_of({"dtype": "float16"}) == [
        "dtype: Gemma 3's activations overflow float16 and its answers come out empty; "
        "use bfloat16 or float32, got 'float16'"
    ]


def test_cuda_without_a_gpu_is_refused() -> None:
    assert mistakes_of({"device": "cuda", "gpus_per_replica": 0}) == [
        "gpus_per_replica: must be at least 1, or auto, with device: cuda, got 0"
    ]


@pytest.mark.parametrize("gpus", [0, "auto"])
def test_cpu_goes_with_no_gpus_only(gpus: object) -> None:
    AppSettings.model_validate({"device": "cpu", "gpus_per_replica": gpus})
    assert mistakes_of({"device": "cpu", "gpus_per_replica": 2}) == [
        "gpus_per_replica: must be 0, or auto, with device: cpu, got 2"
    ]


def test_api_keys_do_not_belong_in_a_file() -> None:
    assert mistakes_of({"api_keys": ["secret"]}) == [
        "api_keys: there is no such setting; keys come from the environment, GEMMA_SERVE_API_KEYS"
    ]


def test_sizes_have_units() -> None:
    settings = AppSettings.model_validate(
        {"kv_cache_memory": "4GiB", "max_body_size": "2MB", "max_image_size": 1000}
    )
    limits = settings.to_api_config(()).limits
    assert settings.to_engine_config().kv_cache_memory_bytes == 4 * 1024**3
    assert limits.max_body_bytes == 2_000_000
    assert limits.images.max_bytes == 1000


def test_images_may_be_forgotten_at_once_but_a_cache_for_keys_and_values_is_needed() -> None:
    settings = AppSettings.model_validate({"vision_cache_memory": 0})
    assert settings.to_engine_config().vision_cache_memory_bytes == 0
    assert mistakes_of({"kv_cache_memory": 0}) == [
        "kv_cache_memory: should be greater than 0, got 0"
    ]


def test_quantisation_reaches_the_model_and_the_cache() -> None:
    settings = AppSettings.model_validate({"quantization": "fp8", "kv_cache_dtype": "fp8"})
    assert settings.to_model_config("cuda").quantization == "fp8"
    assert settings.to_engine_config().kv_cache_dtype == "fp8"
    assert mistakes_of({"quantization": "int3"}) == [
        "quantization: should be 'none', 'bitsandbytes-8bit', 'bitsandbytes-4bit', 'torchao-int8', "
        "'torchao-int4' or 'fp8', got 'int3'"
    ]


def test_served_name_is_the_checkpoints_unless_set() -> None:
    model = "/srv/models/gemma-3-4b-it"
    assert AppSettings(model=model).model_name == "gemma-3-4b-it"
    assert AppSettings(model=model, served_model_name="gemma").model_name == "gemma"


@pytest.mark.parametrize(
    ("value", "keys"), [("", ()), ("one", ("one",)), (" one, two ,", ("one", "two"))]
)
def test_api_keys_are_separated_by_commas(value: str, keys: tuple[str, ...]) -> None:
    assert parse_api_keys({"GEMMA_SERVE_API_KEYS": value}) == keys


def test_without_the_variable_no_key_is_asked_for() -> None:
    assert parse_api_keys({}) == ()


def test_variable_without_a_key_does_not_open_the_server() -> None:
    with pytest.raises(ConfigurationError, match="GEMMA_SERVE_API_KEYS is set, but holds no key"):
        parse_api_keys({"GEMMA_SERVE_API_KEYS": " , "})


def test_keys_can_be_required() -> None:
    settings = AppSettings(require_api_keys=True)
    with pytest.raises(ConfigurationError, match="require_api_keys is set, but there are no keys"):
        settings.to_api_config(())
    assert settings.to_api_config(("key",)).api_keys == ("key",)


def test_draft_model_reaches_the_engine() -> None:
    assert AppSettings().to_engine_config().draft_model is None
    config = AppSettings(draft_model="google/gemma-3-270m-it").to_engine_config()
    assert (config.draft_model, config.speculation) == ("google/gemma-3-270m-it", "off")
    assert config.speculates


def test_speculation_reaches_the_engine_and_needs_a_larger_chunk() -> None:
    settings = AppSettings(speculation="prompt_lookup", num_speculative_tokens=3, max_num_seqs=2)
    config = settings.to_engine_config()
    assert (config.speculation, config.num_speculative_tokens) == ("prompt_lookup", 3)
    assert config.max_sampled_rows == 4
    assert AppSettings(max_num_seqs=2).to_engine_config().max_sampled_rows == 2
    with pytest.raises(ConfigurationError, match="must be less than prefill_chunk_size, 4"):
        AppSettings(
            speculation="prompt_lookup", num_speculative_tokens=4, prefill_chunk_size=4
        ).to_engine_config()


def test_the_limit_of_prompts_beside_answers_reaches_the_engine() -> None:
    assert AppSettings().to_engine_config().max_prefill_slowdown is None
    assert AppSettings(max_prefill_slowdown=2.5).to_engine_config().max_prefill_slowdown == 2.5
    unlimited = AppSettings(max_prefill_slowdown=math.inf).to_engine_config()
    assert unlimited.max_prefill_slowdown == math.inf
    with pytest.raises(ConfigurationError, match="max_prefill_slowdown: should be greater than 1"):
        AppSettings(max_prefill_slowdown=1.0)

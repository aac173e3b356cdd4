"""Check the configuration files of a published checkpoint: each key is read, harmless, or refused.

    known = check("scheduler", read_json(file), file)    raises WeightsError at the first refused key

read        this package uses the value
harmless    the value changes no picture, or the tensors determine it
refused     the value would change the pictures and is not supported

A key may have a list of values that are accepted; all others are refused.  A key that is in no table is
refused, unless its value is empty or off (NOTHING).  An absent key has the default of its library (ABSENT).
docs/checkpoints.md lists all keys.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from ..models.tokenizer import BEGIN_TEXT, END_TEXT
from ..ranges import Count, Natural, Positive, Range, Refusal, expect
from .files import WeightsError, named_as, read_json
from .names import ORIGINAL


class Rule(NamedTuple):
    what: Literal["read", "harmless", "refused"]
    why: str = ""  # reason of a refusal
    values: tuple = ()  # accepted values; empty = all of a key that is read or harmless


Table = dict[str, Rule]  # regular expression of the key -> its rule
NOTHING = (None, False, "", [], {}, 0)
UNKNOWN = Rule("refused", "minireflect does not know this key", NOTHING)


def table(read: str = "", harmless: str = "", **only: object) -> Table:
    """Rules for keys; `only` maps a key to its accepted value, or to a tuple of them."""
    rules = {key: Rule("read") for key in read.split()}
    for key, values in only.items():
        values = values if isinstance(values, tuple) else (values,)
        rules[key] = Rule(rules.get(key, UNKNOWN).what, f"supported: {', '.join(map(repr, values))}", values)
    return rules | {key: Rule("harmless") for key in harmless.split()}


def refused(why: str, keys: str) -> Table:
    """Rules for keys that are refused, unless their value is empty or off."""
    return {key: Rule("refused", why, NOTHING) for key in keys.split()}


# fmt: off
# Key -> its type, in every kind of file.
TYPES = {key: kind for kind, keys in {
    bool: "quick_gelu", list | None: "scheduler", float: "beta_start beta_end", Natural: "num_hidden_layers",
    bool | None: "rescale_betas_zero_snr force_zeros_for_empty_prompt set_alpha_to_one use_rslora",
    str | None: "beta_schedule hidden_act prediction_type timestep_spacing final_sigmas_type _class_name",
    Count: "heads head_width width r", Count | None: "norm_num_groups addition_time_embed_dim",
    Count | None | list[Count]: "num_attention_heads attention_head_dim",
    Count | None | tuple[Count, Count]: "sample_size", Natural | None: "eos_token_id steps_offset",
    Annotated[int, Range(1, 100_000)]: "num_train_timesteps", float | None: "shift_factor lora_alpha",
    Positive | None: "scaling_factor model_max_length", dict[str, dict] | None: "added_tokens_decoder",
    list[float] | None: "image_mean image_std mean std latents_mean latents_std",
    dict[str, float] | None: "alpha_pattern", dict[str, Count] | None: "rank_pattern",
    dict | None: "text_config vision_config text_config_dict vision_config_dict model_cfg text_cfg "
    "vision_cfg preprocess_cfg",
}.items() for key in keys.split()}
# Keys whose value may be a list of accepted values.
LISTS = """unet vae text_encoder text_encoder_2 tokenizer tokenizer_2 down_block_types up_block_types
    only_cross_attention"""
ABOUT = "_.* transformers_version torch_dtype dtype architectures "  # diffusers ignores what begins with _
# Keys that transformers writes into every configuration, most of them for language models.
GENERIC = ABOUT + """initializer_(range|factor) attention_dropout dropout logit_scale_init_value torchscript
    (bos|pad|sep|decoder_start|forced_bos|forced_eos)_token_id return_dict.* use_cache pruned_heads prefix
    output_(attentions|hidden_states|scores) use_bfloat16 tf_legacy_loss chunk_size_feed_forward problem_type
    add_cross_attention cross_attention_hidden_size tie_.* (max|min)_length do_sample early_stopping
    num_(beams|beam_groups|return_sequences|channels) temperature top_k top_p typical_p is_.*decoder
    .*_penalty .*no_repeat_ngram_size bad_words_ids remove_invalid_values .*suppress_tokens finetuning_task
    id2label label2id tokenizer_class task_specific_params gradient_checkpointing
    (hidden|vocab|image|patch|intermediate)_size projection_dim max_position_embeddings"""
YES = (True, None)
TEXT = table("num_hidden_layers num_attention_heads eos_token_id hidden_act", GENERIC, layer_norm_eps=1e-5,
             hidden_act=("quick_gelu", "gelu"), model_type=("clip_text_model", "clip"))
VISION = TEXT | table(harmless="eos_token_id", model_type=("clip_vision_model", "clip"))
SAMPLERS = """solver_(order|type|p) algorithm_type lower_order_final euler_at_final lambda_min_clipped
    use_(karras|exponential|beta)_sigmas use_lu_lambdas variance_type predict_x0 disable_corrector flow_shift
    clip_sample_range sample_max_value dynamic_thresholding_ratio sigma_(min|max) time_shift_type
    skip_prk_steps noise_sampler_seed use_noise_sampler """
DISCRETE = """DDIM DDPM PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete HeunDiscrete KDPM2Discrete
    KDPM2AncestralDiscrete DPMSolverMultistep DPMSolverSinglestep DPMSolverSDE UniPCMultistep DEISMultistep"""
EDM = "an EDM model: its network is scaled by sigma_data and takes noise levels, not times"
DISTILLED = "a consistency model: its network needs a special sampler"
DIT = "Stable Diffusion 3, Flux or another model whose network is a transformer, not a UNet"
REFINER = "SDXL's refiner, which only finishes the pictures of another model"
BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")
TEXTS = ("transformers", "CLIPTextModel", "CLIPTextModelWithProjection", None)
TOKENIZERS = ("transformers", "CLIPTokenizer", "CLIPTokenizerFast", "TokenizersBackend", None)
KINDS: dict[str, Table] = {
    "model_index.json": {
        r"_class_name": Rule("refused", "not Stable Diffusion 1.x, 2.x or SDXL from a prompt alone", (
            "StableDiffusionPipeline", "StableDiffusionXLPipeline", "DiffusionPipeline",
            "StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"))}
    | table("scheduler force_zeros_for_empty_prompt",
            ABOUT + "safety_checker requires_safety_checker image_encoder feature_extractor add_watermarker "
            "watermark requires_aesthetics_score", vae=("diffusers", "AutoencoderKL", None),
            unet=("diffusers", "UNet2DConditionModel", None), text_encoder=TEXTS, text_encoder_2=TEXTS,
            tokenizer=TOKENIZERS, tokenizer_2=TOKENIZERS),
    "scheduler": {
        r"_class_name": Rule("refused", "EDM, flow and consistency models need special samplers", (
            None, *(f"{name}Scheduler" for name in DISCRETE.split())))}
    | table("num_train_timesteps beta_start beta_end beta_schedule prediction_type timestep_spacing "
            "steps_offset set_alpha_to_one rescale_betas_zero_snr final_sigmas_type", ABOUT + SAMPLERS,
            beta_schedule=("scaled_linear", "linear"), trained_betas=None, thresholding=(False, None),
            timestep_spacing=("leading", "trailing", "linspace"), clip_sample=(False, None),
            final_sigmas_type=("zero", None), timestep_type=("discrete", None), predict_epsilon=(True, None),
            prediction_type=("epsilon", "v_prediction", "sample"), interpolation_type=("linear", None))
    | refused("a flow model: its network predicts a velocity between noise and picture, not noise",
              "use_flow_sigmas .*shift.* .*_image_seq_len invert_sigmas stochastic_sampling")
    | refused(DISTILLED, "original_inference_steps timestep_scaling") | refused(EDM, "sigma_data"),
    "UNet": table(
        "attention_head_dim num_attention_heads norm_num_groups addition_time_embed_dim sample_size",
        ABOUT + "(in|out|block_out)_channels .*layers_per_block cross_attention_dim use_linear_projection "
        "upcast_attention dropout projection_class_embeddings_input_dim addition_embed_type_num_heads "
        "mid_block_only_cross_attention decay inv_gamma min_decay power optimization_step update_after_step "
        "use_ema_warmup", down_block_types=BLOCKS, up_block_types=BLOCKS,
        _class_name="UNet2DConditionModel", act_fn=("silu", "swish"), flip_sin_to_cos=True, freq_shift=0,
        norm_eps=1e-5, resnet_time_scale_shift="default", addition_embed_type=(None, "text_time"),
        conv_in_kernel=3, conv_out_kernel=3, time_embedding_type="positional", attention_type="default",
        downsample_padding=1, resnet_out_scale_factor=(1.0, None), only_cross_attention=(False, None),
        mid_block_type=("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None), mid_block_scale_factor=1)
    | refused("no UNet of Stable Diffusion uses it", """center_input_sample class_embed.* num_class_embeds
              encoder_hid_dim.* dual_cross_attention cross_attention_norm time_embedding_(dim|act_fn)
              timestep_post_act resnet_skip_time_act""") | refused(DISTILLED, "time_cond_proj_dim"),
    "VAE": table("scaling_factor shift_factor latents_mean latents_std norm_num_groups",
        ABOUT + "(in|out|latent|block_out)_channels layers_per_block sample_size force_upcast "
        "mid_block_add_attention", _class_name="AutoencoderKL", act_fn=("silu", "swish"), use_quant_conv=True,
        use_post_quant_conv=True, down_block_types="DownEncoderBlock2D", up_block_types="UpDecoderBlock2D"),
    "CLIP": table("(text|vision)_config(_dict)?", GENERIC, model_type="clip"),
    "text encoder": TEXT, "CLIP's text_config": TEXT, "CLIP's vision_config": VISION,
    "preprocessor": table("image_mean image_std crop_size size", "do_convert_rgb do_pad image_processor_type "
        "processor_class feature_extractor_type data_format input_data_format device return_tensors "
        "disable_grouping pad_size image_seq_length " + ABOUT, rescale_factor=1 / 255, resample=(3, None),
        do_resize=YES, do_center_crop=YES, do_rescale=YES, do_normalize=YES, default_to_square=(False, None)),
    "tokenizer": table("pad_token added_tokens_decoder model_max_length", "unk_token add_prefix_space errors "
        "name_or_path special_tokens_map_file clean_up_tokenization_spaces use_fast processor_class backend "
        "additional_special_tokens extra_special_tokens is_local local_files_only add_.*_token from_slow "
        "tokenizer_file max_length truncation_strategy stride pad_to_multiple_of pad_token_type_id "
        "model_type model_input_names trust_remote_code revision subfolder cache_dir " + ABOUT,
        do_lower_case=YES, padding_side=("right", None), truncation_side=("right", None),
        bos_token=(BEGIN_TEXT, None), eos_token=(END_TEXT, None),
        tokenizer_class=TOKENIZERS[1:]),
    "open_clip": table("model_cfg preprocess_cfg", "custom_text tags name"),
    "open_clip's model_cfg": table("quick_gelu text_cfg vision_cfg",
        "embed_dim init_logit_scale output_dict cast_dtype", custom_text=(False, None)),
    "open_clip's text_cfg": table(
        "heads", "context_length vocab_size width layers mlp_ratio pad_id output_tokens", norm_kwargs={},
        pool_type=("argmax", "eos"), proj_type="linear", act_kwargs={}, eos_id=(49407, 2)),
    "open_clip's vision_cfg": table(
        "width head_width", "layers image_size patch_size mlp_ratio patch_dropout output_tokens",
        pool_type="tok", pos_embed_type="learnable", norm_kwargs={}, act_kwargs={}),
    "open_clip's preprocess_cfg": table(
        "mean std size", "fill_color", mode="RGB", interpolation="bicubic", resize_mode=("shortest", None)),
    "single file": {
        r"(model\.)?(diffusion_model\.)?((single_)?transformer|joint|double|single)_(blocks|layers)\..*":
            Rule("refused", DIT), r"text_encoders\..*|model\.transformer\..*": Rule("refused", DIT),
    } | {f"{re.escape(prefix)}.*": Rule("read") for prefix in ORIGINAL} | {
        r"v_pred|ztsnr|alphas_cumprod|denoiser\.sigmas|scale_factor": Rule("read"),
        # other tables of the schedule, which follow from alphas_cumprod, and the state of the training
        r"(alphas|betas|sqrt|log_one_minus|posterior|lvlb)\w*|logvar|denoiser\..*": Rule("harmless"),
        r"model_ema\..*|model\.diffusion_model": Rule("harmless"),
        # ComfyUI writes these also for text encoders without a projection
        r"(cond_stage_model|conditioner\.embedders\.0)\.(logit_scale|text_projection)": Rule("harmless"),
        r"conditioner\.embedders\.0\.model\..*": Rule("refused", REFINER),
        r"edm_mean|edm_std|edm_vpred\..*": Rule("refused", EDM),
        r"scaled_fp8": Rule("refused", "its float8 weights have scales beside them; use another precision"),
        r"embedding_manager\..*|bundle_emb\..*": Rule("refused", "learnt words (textual inversion)"),
    },
    "LoRA": {
        r".*hada_.*": Rule("refused", "a LoHa, not a LoRA: a product of two low-rank differences"),
        r".*lokr_.*": Rule("refused", "a LoKr, not a LoRA: a Kronecker product"),
        r".*(dora_scale|lora_magnitude_vector.*)": Rule("refused", "a DoRA: a LoRA with column lengths"),
        r".*lora_mid\..*": Rule("refused", "a convolution LoRA (LoCon)"),
        r".*oft_.*|.*\.(on_input|a1|a2|b1|b2)\..*": Rule("refused", "not a LoRA but OFT, IA3 or GLoRA"),
        r".*\.alpha": Rule("read"),
        r".*\.(diff(_b)?|w_norm|b_norm)|.*lora_.*\.bias": Rule("refused", "a difference of full rank"),
        r"bundle_emb\..*|emb_params|string_to_param": Rule("refused", "learnt words; only LoRA is supported"),
        r".*lora(\.|_)(A|B|down|up)\b.*|.*\.lora_linear_layer\.(down|up)\.weight": Rule("read"),
    },
    "LoRA's configuration": table("lora_alpha alpha_pattern use_rslora", ABOUT + "r rank_pattern task_type "
        "auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules "
        "exclude_modules lora_dropout layers_to_transform layers_pattern megatron_config megatron_core "
        "loftq_config eva_config qalora_group_size runtime_config ensure_weight_tying",
        peft_type=("LORA", None), bias=("none", None),
        init_lora_weights=(True, False, None, "gaussian", "eva", "orthogonal"))
    | refused("a DoRA: a LoRA with column lengths", "use_dora"),
}
# Defaults of diffusers, transformers, open_clip and peft for keys that are absent from a configuration.
NETWORK = {"num_attention_heads": 8, "num_hidden_layers": 12, "hidden_act": "quick_gelu"}
ABSENT: dict[str, dict] = {
    "scheduler": {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "steps_offset": 0,
                  "num_train_timesteps": 1000, "prediction_type": "epsilon", "timestep_spacing": "linspace",
                  "set_alpha_to_one": True},
    **{f"{name}Scheduler": {"timestep_spacing": "leading", "clip_sample": True} for name in ("DDIM", "DDPM")},
    "PNDMScheduler": {"timestep_spacing": "leading", "set_alpha_to_one": False},
    **{f"{name}Scheduler": {"beta_start": 0.00085, "beta_end": 0.012}
       for name in ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete")},
    "UNet": {"attention_head_dim": 8, "norm_num_groups": 32}, "text encoder": NETWORK,
    "VAE": {"scaling_factor": 0.18215, "norm_num_groups": 32}, "CLIP's text_config": NETWORK,
    "CLIP's vision_config": NETWORK | {"num_attention_heads": 12}, "open_clip's text_cfg": {"heads": 8},
    "open_clip's vision_cfg": {"width": 768, "head_width": 64}, "LoRA's configuration": {"lora_alpha": 8.0},
}
# fmt: on


def check(kind: str, values: Mapping[str, object], source: object) -> dict:
    """Check the values of a file of this kind.  -> the values with defaults for absent keys; {} for {}

    A nested object is checked too if KINDS has a table for it.  Raises WeightsError at the first key that is
    refused or has the wrong type, with its name, its value and the reason.
    """
    of_class, owner = ABSENT.get(str(values.get("_class_name")), {}), kind.partition("'")[0]
    values = {**ABSENT.get(kind, {}), **of_class, **values} if values else {}
    for key, value in values.items():
        rule, inner = rule_of(kind, key), f"{owner}'s {key.removesuffix('_dict')}"
        with named_as("", Refusal):
            expect(value, TYPES.get(key, object), f"{key} in {source}")
        if inner in KINDS and value:
            values[key] = check(inner, value, f"{source} ({key})")
        if isinstance(value, dict) and key.endswith("_token"):
            value = value.get("content", value)
        each = value if isinstance(value, list | tuple) and value and key in LISTS.split() else [value]
        if (rule.values or rule.what == "refused") and not all(part in rule.values for part in each):
            said = f"has {key}" if value is key else f"asks for {key} = {value!r}"
            raise WeightsError(f"{source} {said[:150]}, which is refused: {rule.why}")
    return values


def read_stated(kind: str, path: Path, needed: bool = False) -> dict:
    """Read and check a configuration file; {} if there is none.

    Raises WeightsError as `check`, and when the file is `needed` but missing or empty.
    """
    if not (values := read_json(path)) and needed:
        raise WeightsError(f"{path} is missing or empty: every folder of diffusers has this file")
    return check(kind, values, path)


def rule_of(kind: str, key: str) -> Rule:
    """The rule of the first pattern that matches the key."""
    return next((rule for pattern, rule in KINDS[kind].items() if re.fullmatch(pattern, key)), UNKNOWN)


def check_names(kind: str, names: Iterable[str], source: object) -> list[str]:
    """Check the tensor names of a file.  -> the names that are in no table

    Raises WeightsError at the first refused name.
    """
    unknown = [name for name in names if rule_of(kind, name) is UNKNOWN]
    check(kind, {name: name for name in names if name not in unknown}, source)
    return unknown

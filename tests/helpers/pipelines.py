"""Tiny pipelines of diffusers with random weights, written to folders."""

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from lightning_modules.backbone.tiny_pipeline import tiny_autoencoder, tiny_text_parts


def letters() -> T5Tokenizer:
    """A tokenizer of single letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0)]
    return T5Tokenizer(vocab=[*special, *((letter, -1.0) for letter in string.ascii_lowercase)], extra_ids=0)


def tiny_flux(folder: Path, distilled: bool = True) -> str:
    """FLUX.1-dev's make, where guidance is a number that the network reads, or schnell's."""
    torch.manual_seed(0)
    t5 = T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=distilled, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    tokenizer, text = tiny_text_parts()
    vae = tiny_autoencoder(use_quant_conv=False, use_post_quant_conv=False)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=distilled)
    parts: Any = (scheduler, vae, CLIPTextModel(text), tokenizer, t5, letters(), transformer)
    FluxPipeline(*parts).save_pretrained(folder)
    return str(folder)


def tiny_sana(folder: Path) -> str:
    """Sana's make, but with a solver of first order."""
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=32,
    )  # fmt: skip
    blocks: Any = {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, **blocks, encoder_block_out_channels=(4, 8),
        decoder_block_out_channels=(4, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()), scaling_factor=0.5,
    )  # fmt: skip
    sizes: Any = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = Gemma2Model(Gemma2Config(vocab_size=64, **sizes, num_key_value_heads=2, head_dim=4))
    flow: Any = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    scheduler = DPMSolverMultistepScheduler(**flow, solver_order=1)
    parts: Any = (letters(), text, vae, transformer, scheduler)
    SanaPipeline(*parts).save_pretrained(folder)
    return str(folder)


def tiny_qwen_image(folder: Path) -> str:
    """Qwen-Image's make."""
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    text: Any = {**sizes, "num_key_value_heads": 2, "rope_scaling": rope, "rope_theta": 1e6, "vocab_size": 64}
    vision: Any = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 1.5, 2.0, 2.5],
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    parts: Any = (scheduler, vae, encoder, letters(), transformer)
    QwenImagePipeline(*parts).save_pretrained(folder)
    return str(folder)


def tiny_sdxl(folder: Path, prediction: str = "epsilon", scheduler: type[Any] = EulerDiscreteScheduler) -> str:
    """Stable Diffusion XL's make, with its own levels of noise."""
    tokenizer, text = tiny_text_parts()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=2, norm_num_groups=4, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8,
    )  # fmt: skip
    levels: Any = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    StableDiffusionXLPipeline(
        vae=tiny_autoencoder(), text_encoder=CLIPTextModel(text), text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet,
        scheduler=scheduler(**levels, timestep_spacing="leading", steps_offset=1, prediction_type=prediction),
        add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def tiny_unet(folder: Path, distilled: bool) -> str:
    """Stable Diffusion 1.5's make, with guidance in two passes or, distilled to latent consistency, as a number."""
    unet = UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4, time_cond_proj_dim=8 if distilled else None,
    )  # fmt: skip
    tokenizer, text = tiny_text_parts()
    kind = LatentConsistencyModelPipeline if distilled else StableDiffusionPipeline
    scheduler = LCMScheduler() if distilled else PNDMScheduler(skip_prk_steps=True)
    kind(
        vae=tiny_autoencoder(), text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)

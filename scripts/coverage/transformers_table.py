"""The table of all Vision Transformers of transformers, with a row for classes that need the same settings and inputs.

Models are made small, since the code of an architecture does not depend on its size. All other settings of
vision-language models are the library's defaults, so that their vision towers are as in the released models. Every flag
that changes the blocks has its own row.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from coverage import transformers_inputs as inputs
from coverage.transformers_inputs import SIDE
from coverage.transformers_small import Row, Settings

TIMM = {"embed_dim": 32, "depth": 3, "num_heads": 4, "img_size": 4 * SIDE, "patch_size": SIDE}
"""The sizes of a tower that timm builds."""

# All but the generative vision-language models ------------------------------------------------------------------------

_WIDE, _TALL = inputs.grid(4, 6), inputs.grid(8, 6)
_RESIZED = inputs.grid(4, 6, interpolate_pos_encoding=True)
_PAIRS, _CAPTIONED = inputs.grid(**inputs.TWO_TEXTS), inputs.grid(**inputs.TEXT_EACH)
_HIDDEN = ("hidden_states",)
_PLACES = torch.tensor([0, 1, 1, 0, 0, 0])  # 1 for the tokens of the text that Kosmos replaces by image features
_KOSMOS = inputs.grid(**inputs.TEXT_EACH, image_embeds_position_mask=lambda number: _PLACES, use_cache=False)
_DECODED = inputs.grid(decoder_input_ids=lambda number: inputs.TOKENS, use_cache=False)
# ViT-MAE keeps the patches with the smallest random noise. With this noise, it keeps the first ones in their order.
_IN_ORDER = inputs.grid(noise=lambda number: torch.arange(16.0))
_VIDEO = inputs.inputs(pixel_values=inputs.video)
_VIDEO_OF_PRISM = inputs.inputs(pixel_values_videos=inputs.video)
_MASKED_VIDEO = inputs.inputs(pixel_values=inputs.video, bool_masked_pos=lambda number: torch.arange(32) % 2 == 1)
_WITH_EXPERTS = inputs.grid(8, 6, dataset_index=lambda number: torch.tensor(number % 3))
_RELATIVE = {"use_relative_position_bias": True}
_SHARED = {"use_shared_relative_position_bias": True}
_EAGER = {"attn_implementation": "eager"}  # for models that choose the implementation when they are built
_SWIGLU = {"use_swiglu_ffn": True}
_TAPS = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
_TWO = {"out_indices": [1, 3]}
_NECK = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
_DPT = {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], **_NECK}
_UPERNET = {"pool_scales": [1, 2], "auxiliary_channels": 8}
_MAE = {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4, "decoder_hidden_size": 32}
_VIT_AND_BERT = {"vision_config": {"model_type": "vit"}, "text_config": {"model_type": "bert"}}
_SEQUENCES = {"reshape_hidden_states": False, "apply_layernorm": False}
_POSE = {"image_size": [32, 24], "patch_size": [8, 8], "part_features": 16, "num_experts": 1}
_POSE_HEAD = {"backbone_config": {"model_type": "vitpose_backbone", **_POSE}}
_PYRAMID = {"conv_out_channels": [8], "scale_conv_out_channels": [8]}
_PYRAMID |= {"upsample_out_channels": [8, 8], "scale_final_hidden_sizes": [8, 8]}
_DEIMV2 = {"encoder_in_channels": [32] * 3, "decoder_in_channels": [32] * 3}
_DEIMV2 |= {"num_denoising": 0, "decoder_layers": 2, "num_queries": 4, "lqe_hidden_dim": 8, "encoder_hidden_dim": 32}
_DEIMV2 |= {"backbone_config": {"model_type": "dinov3_vit", "patch_size": 16, "out_indices": [1, 2, 3]}}
_BRIDGETOWER = {"hidden_size": 128, "num_hidden_layers": 2, "vision_config": {"hidden_size": 128}}  # heads have 64
_BRIDGETOWER |= {"text_config": {"hidden_size": 128, "num_hidden_layers": 3}}
_MIT = {"mit_hidden_size": 32, "mit_intermediate_size": 32, "mit_num_attention_heads": 4}
_XCLIP = {"prompt_num_attention_heads": 4, "prompt_layers": 1, "vision_config": {"num_frames": 4, **_MIT}}
_PRISM = {"num_frames": 4, "tubelet_size": [1, SIDE, SIDE]}
_PRISM |= {"num_spatial_layers": 3, "num_temporal_layers": 2, "num_auxiliary_layers": 1}


def _dense(backbone: str = "dinov2", flags: Settings | None = None, **head: Any) -> Settings:
    """Settings of a model whose head has a small convolutional neck on four outputs of a backbone."""
    taps = {"model_type": backbone, **_TAPS, "reshape_hidden_states": False, **(flags or {})}
    return {"backbone_config": taps, **_NECK, "head_hidden_size": 8, "reassemble_hidden_size": 32, **head}


def _timm(architecture: str) -> Settings:
    return {"architecture": architecture, "model_args": TIMM, "num_labels": 5}


def _trocr(encoder: str) -> Settings:
    return {"encoder": {"model_type": encoder}, "decoder": {"model_type": "trocr", "decoder_attention_heads": 4}}


VISION = (
    # Image encoders
    Row(
        """ViTModel ViTForImageClassification ViTForMaskedImageModeling DeiTModel DeiTForImageClassification
        DeiTForImageClassificationWithTeacher DeiTForMaskedImageModeling ViTMSNModel ViTMSNForImageClassification
        IJepaModel IJepaForImageClassification BeitModel BeitForImageClassification Data2VecVisionModel
        Data2VecVisionForImageClassification DINOv3ViTModel DINOv3ViTBackbone Aimv2VisionModel MLCDVisionModel
        CLIPVisionModel CLIPVisionModelWithProjection MetaClip2VisionModel MetaClip2VisionModelWithProjection
        CLIPSegVisionModel AltCLIPVisionModel ChineseCLIPVisionModel GitVisionModel SiglipVisionModel
        OwlViTVisionModel Owlv2VisionModel FlavaImageModel BlipVisionModel RadioModel""",
        {"encoder_stride": SIDE},
    ),
    Row(
        """Dinov2Model Dinov2ForImageClassification Dinov2Backbone Dinov2WithRegistersModel
        Dinov2WithRegistersForImageClassification Dinov2WithRegistersBackbone PixioModel PixioBackbone
        Tipsv2VisionModel Tipsv2VisionBackbone""",
        _TWO,
    ),
    Row("IJepaModel CLIPVisionModel OwlViTVisionModel Owlv2VisionModel BlipVisionModel [4x6 patches]", {}, _RESIZED),
    Row("ViTModel ViTForImageClassification [4x6 patches]", {"qkv_bias": False}, _RESIZED),
    Row("SiglipVisionModel [no head, 4x6 patches]", {"vision_use_head": False}, _RESIZED),
    Row("ViTMAEModel", {"mask_ratio": 0.0}, _IN_ORDER),
    Row("ViTMAEModel ViTMAEForPreTraining [half masked]", {"mask_ratio": 0.5, **_MAE}, _IN_ORDER),
    Row("BeitModel BeitForImageClassification Data2VecVisionModel [bias in each block]", _RELATIVE),
    Row("BeitModel Data2VecVisionModel [shared bias]", _SHARED),
    Row("BeitModel Data2VecVisionModel [absolute positions]", {"use_absolute_position_embeddings": True}),
    Row("BeitModel Data2VecVisionModel [no layer scale]", {"layer_scale_init_value": 0.0}),
    Row("BeitModel Data2VecVisionModel [CLS pooling]", {"use_mean_pooling": False}),
    Row("Data2VecVisionModel [bias in each block, eager]", _RELATIVE | _EAGER),
    Row("Data2VecVisionModel [shared bias, eager]", _SHARED | _EAGER),
    Row("BeitModel [bias in each block, 4x6 patches]", _RELATIVE, _RESIZED),
    Row("BeitModel [shared bias, 4x6 patches]", _SHARED, _RESIZED),
    Row("BeitForMaskedImageModeling", _SHARED | {"use_mask_token": True}),
    Row("BeitBackbone", _RELATIVE | _TWO),
    Row("BeitBackbone [shared bias, FPN]", _SHARED | _TAPS | {"add_fpn": True}),
    Row("BeitForSemanticSegmentation Data2VecVisionForSemanticSegmentation", _RELATIVE | _TAPS | _UPERNET),
    Row("Dinov2Backbone Dinov2WithRegistersBackbone [token sequences]", _SEQUENCES),
    Row("Dinov2Model Dinov2Backbone Dinov2WithRegistersModel Tipsv2VisionModel [SwiGLU, 4x6 patches]", _SWIGLU, _WIDE),
    Row("DINOv3ViTModel [registers, gated, 4x6 patches]", {"num_register_tokens": 4, "use_gated_mlp": True}, _WIDE),
    Row("DINOv3ViTBackbone [registers]", {"num_register_tokens": 4, **_TWO}),
    Row("PixioModel [one CLS, 4x6 patches]", {"n_cls_tokens": 1}, _WIDE),
    Row("RadioModel [SwiGLU, 4x6 patches]", _SWIGLU, _WIDE),
    Row("Aimv2VisionModel [biases, no head]", {"qkv_bias": True, "mlp_bias": True, "use_head": False}),
    Row("Aimv2VisionModel [native, 4x6 patches]", {"is_native": True}, _WIDE),
    Row("Sapiens2Model Sapiens2Backbone", {"num_first_full_attention_layers": 3, **_TWO}),
    Row(
        "Sapiens2Model [grouped queries, plain MLP, no registers, 4x6 patches]",
        {"num_key_value_heads_per_layer": [4, 2, 4]}
        | {"num_register_tokens": 0, "use_qk_norm": False, "use_gated_mlp": False},
        _WIDE,
    ),
    Row("TimmWrapperModel TimmWrapperForImageClassification", _timm("vit_tiny_patch16_224"), extras=_HIDDEN),
    Row("TimmWrapperModel [EVA02]", _timm("eva02_tiny_patch14_224"), extras=_HIDDEN),
    Row("TimmBackbone", {"backbone": "test_vit", **_TWO}, inputs.grid(40, 40), extras=()),
    # With text
    Row("CLIPModel MetaClip2Model CLIPSegModel AltCLIPModel ChineseCLIPModel SiglipModel Aimv2Model", inputs=_PAIRS),
    Row("Tipsv2Model OwlViTModel Owlv2Model BlipModel", inputs=_PAIRS),
    Row("CLIPForImageClassification MetaClip2ForImageClassification SiglipForImageClassification"),
    Row("CLIPSegForImageSegmentation", {"extract_layers": [1, 2], "reduce_dim": 16}, _CAPTIONED),
    Row("Siglip2VisionModel Siglip2ForImageClassification", {}, inputs.siglip2),
    Row("Siglip2VisionModel [no head]", {"vision_use_head": False}, inputs.siglip2),
    Row("Siglip2Model", {}, partial(inputs.siglip2, **inputs.TWO_TEXTS)),
    Row("OwlViTForObjectDetection Owlv2ForObjectDetection FlavaModel BlipForImageTextRetrieval", inputs=_CAPTIONED),
    Row("VisionTextDualEncoderModel", _VIT_AND_BERT, _PAIRS),
    # BridgeTower's hidden states are (T, B, C).
    Row("BridgeTowerModel", _BRIDGETOWER, _CAPTIONED, extras=("attentions",)),
    Row("VisionEncoderDecoderModel [TrOCR with ViT]", _trocr("vit"), _DECODED),
    Row("VisionEncoderDecoderModel [TrOCR with DeiT]", _trocr("deit"), _DECODED),
    Row("Kosmos2Model", {"latent_query_num": 2}, _KOSMOS),
    Row("GitModel", {}, inputs.grid(**inputs.TEXT_EACH, use_cache=False)),
    Row("Pix2StructVisionModel", {"patch_embed_hidden_size": 48, "d_kv": 8, "d_ff": 64}, inputs.flattened),
    # Dense prediction
    Row("DepthAnythingForDepthEstimation PromptDepthAnythingForDepthEstimation", _dense()),
    Row("DPTModel", {"is_hybrid": False}),
    Row("DPTForDepthEstimation DPTForSemanticSegmentation", _DPT),
    Row("DPTForDepthEstimation [Dinov2 backbone]", _dense()),
    Row(
        "ZoeDepthForDepthEstimation",
        _dense("beit", _RELATIVE, bottleneck_features=8, bin_embedding_dim=8, num_attractors=[4, 2, 2, 1]),
    ),
    Row(
        "CHMv2ForDepthEstimation",
        _dense("dinov3_vit", {"return_class_token": True, "reshape_hidden_states": True})
        | {"post_process_channels": [8] * 4, "number_output_channels": 8},
    ),
    Row(
        "Tipsv2DptForDepthEstimation Tipsv2DptForNormalEstimation Tipsv2DptForSemanticSegmentation",
        _dense("tipsv2_vision_model"),
    ),
    Row("VitPoseBackbone", _POSE | _TWO, _TALL),
    Row("VitPoseBackbone [experts]", _POSE | _TWO | {"num_experts": 3}, _WITH_EXPERTS),
    Row("VitPoseForPoseEstimation", _POSE_HEAD | {"use_simple_decoder": False}, _TALL),
    Row("VitPoseForPoseEstimation [simple decoder]", _POSE_HEAD | {"use_simple_decoder": True}, _TALL),
    Row("Deimv2ForObjectDetection", _DEIMV2, inputs.grid(16, 16)),
    Row(
        """Sapiens2ForSemanticSegmentation Sapiens2ForPoseEstimation Sapiens2ForNormalEstimation
        Sapiens2ForPointmapEstimation Sapiens2ForImageMatting""",
        {"head_config": _PYRAMID, "num_key_value_attention_heads": 4},
    ),
    Row(
        "UperNetForSemanticSegmentation",
        {"hidden_size": 8, **_UPERNET, "backbone_config": {"model_type": "beit", **_RELATIVE, **_TAPS}},
    ),
    Row("MgpstrModel", {"image_size": [16, 24], "max_token_length": 4}, _WIDE),
    # Videos
    Row("VideoMAEModel VideoMAEForVideoClassification", {"num_frames": 4}, _VIDEO),
    Row("VideoMAEModel [no mean pooling]", {"num_frames": 4, "use_mean_pooling": False, "qv_bias": False}, _VIDEO),
    Row("VideoMAEForPreTraining", {"num_frames": 4, **_MAE}, _MASKED_VIDEO),
    Row("VivitModel VivitForVideoClassification", {"num_frames": 4, "tubelet_size": [2, SIDE, SIDE]}, _VIDEO),
    Row("VideoPrismVisionModel VideoPrismVideoModel VideoPrismForVideoClassification", _PRISM, _VIDEO_OF_PRISM),
    Row("XCLIPVisionModel", {"num_frames": 4}, inputs.video_frames),
    Row("XCLIPModel", _XCLIP, inputs.inputs(pixel_values=inputs.video, **inputs.TWO_TEXTS)),
)

# Vision-language models -----------------------------------------------------------------------------------------------


def _vision(settings: Settings | None = None, **more: Any) -> Settings:
    """Settings of the vision tower."""
    return {"vision_config": {**(settings or {}), **more}}


TILED = {"image_grid_pinpoints": [[4 * SIDE, 8 * SIDE]]}
GRANITE = {"downsample_rate": "1/2", "deepstack_layer_map": [[-2, 0]], "spatial_target_layers": [0, 1, 2, 2]}
GEMMA4 = _vision(model_type="gemma4_vision", pooling_kernel_size=2)
EXPERTS = {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}}
NO_CLS = {"vision_feature_select_strategy": "full"}
DEEPSTACK = _vision(deepstack_visual_indexes=[0, 1])
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SLIDING = {"layer_types": ["sliding_attention"] * 3, "rope_parameters": {"sliding_attention": ROPE}}
MLLAMA = _vision(num_global_layers=2, intermediate_layers_indices=[0, 2], vision_output_dim=96)
MLLAMA |= {"text_config": {"rope_scaling": ROPE}}  # transformers 4 has no default
LLAMA4 = dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32)
LLAMA4 = _vision(LLAMA4, intermediate_size=128) | {"text_config": {"intermediate_size_mlp": 64}}
NEMOTRON = {"vision_hidden_size": 32, "projector_hidden_size": 32}
JANUS = {"vq_config": {"base_channels": 32, "channel_multiplier": [1], "num_embeddings": 16}}
PERCEPTION = _vision(architecture="vit_pe_core_tiny_patch16_384", model_args=TIMM)
MOLMO = _vision(image_size=[16, 16], num_position_embeddings=16) | {"adapter_config": {"vision_feature_layer": [2, 1]}}
_tile = partial(inputs.squares, tiled=True)
_masked_tile = partial(_tile, pixel_attention_mask=torch.ones(1, 1).bool())
_single = partial(inputs.packed, merge=1)


def _mrope(*section: int) -> Settings:
    return {"text_config": {"rope_parameters": ROPE | {"mrope_section": section}}}


VLM = (
    Row("Blip2* InstructBlipVideo* Llava* PaliGemma* AyaVision* DeepseekVL* DeepseekVLHybrid*"),
    Row("Kosmos2* Step3p7* PI0* Blip2ForImageTextRetrieval IdeficsForVisionText2Text"),
    Row("ColPaliForRetrieval ShieldGemma2ForImageClassification"),
    Row("ModernVBertForMaskedLM ColModernVBertForRetrieval UltraVBertForMaskedLM"),
    Row("InstructBlip*", inputs=partial(inputs.squares, qformer_input_ids=torch.full((1, 3), 7))),
    Row("Llava*[SigLIP]", _vision(model_type="siglip_vision_model") | NO_CLS),
    Row("Llava*[Pixtral]", _vision(model_type="pixtral", image_size=32) | NO_CLS, inputs.pixtral, packed=True),
    Row("LlavaNext* LlavaNextVideo* LlavaOnevision*", TILED, inputs.tiles),
    Row("Granite4Vision*", _vision(hidden_size=64) | TILED | GRANITE, inputs.tiles),
    Row("VipLlava*", {"vision_feature_layers": [-2, 1]}),
    Row("Gemma3*", {"mm_tokens_per_image": 4}),
    Row("T5Gemma2*", {"encoder": {"mm_tokens_per_image": 4}}),
    Row("Gemma4* EmbeddingGemma2Model", GEMMA4, inputs.gemma4),
    Row("DiffusionGemmaForBlockDiffusion", GEMMA4 | EXPERTS, inputs.gemma4),
    Row("Cohere2Vision*", {"alignment_intermediate_size": 64}),
    Row("InternVL* QianfanOCR*", _vision(image_size=4 * SIDE, patch_size=SIDE)),
    Row("Idefics2* Idefics3* SmolVLM*", inputs=inputs.idefics),
    Row("Aria*", {"projector_patch_to_query_dict": {64: 4}}, partial(inputs.idefics, mask_name="pixel_mask")),
    Row("GraniteDocling*", DEEPSTACK, _masked_tile),
    Row("PixtralVisionModel", {"image_size": 32}, inputs.pixtral, packed=True),
    Row("Mistral3* MistralLarge4* LightOnOcr*", _vision(image_size=8 * SIDE), inputs.pixtral, packed=True),
    Row("Mllama*", MLLAMA, inputs.mllama),
    Row("Llama4*", LLAMA4, inputs.llama4),
    Row("Lfm2Vl*", inputs=inputs.siglip2),
    Row("Qwen2VL* ColQwen2ForRetrieval Qwen3_5* Qwen3_5Moe* Qwen4Exp*", inputs=inputs.qwen),
    Row("Glm4v* Glm4vMoe* Glm46V* Glm5Next* GlmOcr*", inputs=inputs.qwen),
    Row("Qwen3VL* Qwen3VLMoe* Qwen3OmniMoeThinker* Cosmos3Omni*", DEEPSTACK, inputs.qwen),
    Row("CohereCompass*", DEEPSTACK | {"text_config": SLIDING}, inputs.qwen),
    Row("Cosmos3Edge*", _mrope(2, 1, 1), inputs.packed),
    Row("Ernie4_5_VLMoe*", _mrope(1, 1, 2), inputs.packed),
    Row("GlmImage*", inputs=_single),
    Row("PaddleOCRVL*", inputs=inputs.paddle, packed=True),
    Row("VideoLlama3*", inputs=inputs.video_llama, packed=True),
    Row("HunYuanVL*", {"text_config": {"head_dim": 8}}, _single, packed=True),
    Row("Kimi_K25*", {"projection_hidden_size": 32}, partial(_single, flat=False)),
    Row("MiniMaxM3Sparse*", inputs=inputs.qwen, packed=True, shared="pooler_output"),
    Row("Inkling2*", inputs=inputs.inkling, packed=True),
    Row(
        "NemotronH_Omni_Reasoning_V3",
        {"vision_hidden_size": 32, "projector_hidden_size": 32},
        inputs.radio,
        packed=True,
    ),
    Row("Kosmos2_5*", _vision(patch_embed_hidden_size=48), inputs.flattened),
    Row("Pix2Struct*", _vision(patch_embed_hidden_size=48, d_kv=8, d_ff=64), inputs.flattened),
    Row("Janus*", JANUS),
    Row("UnlimitedOcr*", _vision(sam_config={"downsample_channels": [32, 32]})),
    Row("Ovis2*", shared="visual_indicator_features"),
    Row("PerceptionLM*", PERCEPTION, _tile, extras=_HIDDEN),
    Row("Molmo2*", MOLMO, inputs.molmo),
)

# Refused, in the library's default sizes ------------------------------------------------------------------------------

_ONE_LAYER = {"num_hidden_layers": 1, "mlp_layer_types": ["dense"]}
_VITDET = {"model_type": "vitdet", "out_features": ["stage12"]}
_WINDOWS = {"window_size": 2, "window_block_indices": [0, 1], "residual_block_indices": [2]}
REFUSED = (
    Row(
        """DeepseekOcr2VisionModel Dots3NoteForConditionalGeneration EomtDinov3ForUniversalSegmentation
        EomtForUniversalSegmentation Exaone4_5_ForConditionalGeneration Florence2ForConditionalGeneration
        GotOcr2ForConditionalGeneration GroupViTVisionModel HieraModel HyperCLOVAXVisionV2ForConditionalGeneration
        Lfm3VlForConditionalGeneration LwDetrForObjectDetection LwDetrViTBackbone MiniCPMOcrForConditionalGeneration
        MiniCPMV4_6ForConditionalGeneration MiniCPMV4_7ForConditionalGeneration MuseGlimmerForConditionalGeneration
        MuseSparkForConditionalGeneration Phi4MultimodalForCausalLM Qwen2_5OmniThinkerForConditionalGeneration
        Qwen2_5_VLForConditionalGeneration RfDetrDinov2Backbone RfDetrForInstanceSegmentation RfDetrForObjectDetection
        Sam2VisionModel Sam3ViTModel Sam3VisionModel SamHQVisionModel SamVisionModel SegGptForImageSegmentation
        SegGptModel SwinModel VJEPA2ForVideoClassification VJEPA2Model VideoLlavaForConditionalGeneration
        VideomtForUniversalSegmentation ViltForImageAndTextRetrieval ViltForQuestionAnswering VitDetBackbone VitDetModel
        YolosForObjectDetection YolosModel"""
    ),
    Row("DeepseekOcr2*", {"text_config": _ONE_LAYER}),
    Row("DepthProForDepthEstimation", {"use_fov_model": True}),
    Row("EomtForUniversalSegmentation [SwiGLU]", {"use_swiglu_ffn": True}),
    Row("EomtDinov3ForUniversalSegmentation [gated]", {"use_gated_mlp": True}),
    Row("SamVisionModel [no relative positions]", {"use_rel_pos": False}),
    Row("SamVisionModel SamHQVisionModel [no windows]", {"window_size": 0}),
    Row("SamVisionModel SamHQVisionModel [eager]", {"attn_implementation": "eager"}),
    *(
        Row(f"TimesformerModel TimesformerForVideoClassification [{kind}]", {"attention_type": kind})
        for kind in ("divided_space_time", "joint_space_time", "space_only")
    ),
    Row("VitDetModel [windows]", _WINDOWS),
    Row("VitMatteForImageMatting", {"backbone_config": _VITDET, "fusion_hidden_sizes": [256, 128, 64, 32]}),
    Row("YolosModel [positions only at the start]", {"use_mid_position_embeddings": False}),
)

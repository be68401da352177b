"""Small configurations of many transformers architectures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from _small_models import (
    SIZES,
    Architecture,
    AutoModel,
    audio,
    conv,
    decoder,
    masked_tokens,
    seq2seq,
    spectrogram,
    text,
    tokens,
    video,
    vision,
)

_STAGES: Mapping[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64]}
_SWIN: Mapping[str, Any] = {
    "embed_dim": 16,
    "depths": [1, 1, 2],
    "num_heads": [1, 2, 4],
    "window_size": 4,
    "patch_size": 4,
}
_SPEECH: Mapping[str, Any] = {
    "conv_dim": (32, 32),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
_BART: Mapping[str, Any] = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
}
_T5: Mapping[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
_MOE: Mapping[str, Any] = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}

ARCHITECTURES: Mapping[str, Architecture] = {
    "bert": text(),
    "roberta": text(),
    "albert": text(embedding_size=32),
    "electra": text(embedding_size=32),
    "distilbert": text(dim=64, n_layers=2, n_heads=4, hidden_dim=128),
    "mobilebert": text(
        embedding_size=32, intra_bottleneck_size=32, true_hidden_size=32, num_feedforward_networks=2
    ),
    "deberta": text(),
    "deberta-v2": text(),
    "camembert": text(),
    "xlm-roberta": text(),
    "mpnet": text(),
    "convbert": text(embedding_size=64, conv_kernel_size=3, num_groups=1, head_ratio=2),
    "squeezebert": text(embedding_size=64),
    "rembert": text(input_embedding_size=32, output_embedding_size=32),
    "roformer": text(embedding_size=64),
    "megatron-bert": text(),
    "nystromformer": Architecture(
        SIZES,
        tokens,
        AutoModel,
        {"num_landmarks": 16, "segment_means_seq_len": 16, "conv_kernel_size": 3},
    ),
    "ernie": text(),
    "esm": text(mask_token_id=4, position_embedding_type="absolute"),
    "fnet": Architecture(SIZES, tokens, AutoModel, {"use_tpu_fourier_optimizations": False}),
    "funnel": Architecture(
        {"vocab_size": 128, "block_sizes": [1, 1], "d_model": 64, "n_head": 4, "d_head": 16},
        masked_tokens,
        AutoModel,
        {"d_inner": 128, "num_decoder_layers": 1, "architectures": ["FunnelModel"]},
    ),
    "layoutlm": text(),
    "longformer": text(attention_window=4),
    "modernbert": text(global_attn_every_n_layers=2, local_attention=8),
    "nomic_bert": text(),
    "xlnet": Architecture(
        {"vocab_size": 128, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128}, masked_tokens
    ),
    "gpt2": decoder(n_embd=64, n_layer=2, n_head=4),
    "gpt_neo": decoder(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
    "gpt_neox": decoder(),
    "gptj": decoder(n_embd=64, n_layer=2, n_head=4, rotary_dim=8),
    "gpt_bigcode": decoder(n_embd=64, n_layer=2, n_head=4),
    "opt": decoder(ffn_dim=128, word_embed_proj_dim=64),
    "bloom": decoder(n_layer=2, n_head=4),
    "llama": decoder(),
    "mistral": decoder(),
    "qwen2": decoder(),
    "qwen3": decoder(head_dim=16),
    "gemma": decoder(head_dim=16),
    "gemma2": decoder(head_dim=16, query_pre_attn_scalar=16, sliding_window=8),
    "phi": decoder(),
    "phi3": decoder(),
    "falcon": decoder(),
    "stablelm": decoder(),
    "starcoder2": decoder(),
    "olmo": decoder(),
    "olmo2": decoder(),
    "cohere": decoder(),
    "granite": decoder(),
    "mamba": decoder(state_size=8),
    "mixtral": decoder(**_MOE),
    "qwen2_moe": decoder(
        **_MOE, moe_intermediate_size=64, shared_expert_intermediate_size=64, decoder_sparse_step=1
    ),
    "granitemoe": decoder(**_MOE),
    "olmoe": decoder(**_MOE),
    "bart": seq2seq(**_BART),
    "mbart": seq2seq(**_BART),
    "pegasus": seq2seq(**_BART),
    "marian": seq2seq(**_BART, decoder_start_token_id=0),
    "t5": seq2seq(**_T5, decoder_start_token_id=0),
    "mt5": seq2seq(**_T5, decoder_start_token_id=0),
    "vit": vision(),
    "deit": vision(),
    "beit": vision(),
    "dinov2": vision(),
    "dinov2_with_registers": vision(),
    "ijepa": vision(),
    "vit_msn": vision(),
    "yolos": vision(image_size=[32, 32], num_detection_tokens=4),
    "clip_vision_model": vision(projection_dim=32),
    "siglip_vision_model": vision(),
    "data2vec-vision": vision(),
    "hiera": conv(
        64,
        image_size=[64, 64],
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        masked_unit_size=[8, 8],
    ),
    "swin": conv(64, image_size=64, **_SWIN),
    "swinv2": conv(64, image_size=64, **_SWIN),
    "donut-swin": conv(64, image_size=64, **_SWIN),
    "focalnet": vision(64, embed_dim=16, depths=[1, 1, 1, 1], patch_size=4),
    "pvt": conv(
        64,
        image_size=64,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 48, 64],
        num_attention_heads=[1, 2, 2, 4],
    ),
    "pvt_v2": conv(
        64,
        image_size=64,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 48, 64],
        num_attention_heads=[1, 2, 2, 4],
    ),
    "segformer": conv(
        depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64], num_attention_heads=[1, 2, 2, 4]
    ),
    "cvt": conv(embed_dim=[16, 32, 64], depth=[1, 2, 3], num_heads=[1, 2, 4]),
    "levit": conv(
        64,
        image_size=64,
        hidden_sizes=[16, 32, 48],
        num_attention_heads=[1, 2, 3],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    "mobilevit": conv(
        64,
        image_size=64,
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
        num_attention_heads=2,
    ),
    "mobilevitv2": conv(64, image_size=64, width_multiplier=0.5),
    "efficientnet": conv(
        64, image_size=64, width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320
    ),
    "mobilenet_v1": conv(64, image_size=64, depth_multiplier=0.25),
    "mobilenet_v2": conv(64, image_size=64, depth_multiplier=0.25),
    "resnet": conv(embedding_size=16, **_STAGES),
    "regnet": conv(embedding_size=16, groups_width=16, **_STAGES),
    "bit": conv(embedding_size=16, num_groups=8, **_STAGES),
    "convnext": conv(**_STAGES),
    "convnextv2": conv(**_STAGES),
    "poolformer": conv(**_STAGES),
    "swiftformer": conv(64, image_size=64, depths=[1, 1, 1, 1], embed_dims=[16, 24, 32, 48]),
    "hgnet_v2": conv(64),
    "textnet": conv(64),
    "vitdet": vision(64, pretrain_image_size=64),
    "wav2vec2": audio(**_SPEECH),
    "hubert": audio(**_SPEECH),
    "wavlm": audio(**_SPEECH),
    "data2vec-audio": audio(**_SPEECH),
    "sew": audio(**_SPEECH, squeeze_factor=2),
    "unispeech": audio(
        **_SPEECH, num_codevectors_per_group=8, codevector_dim=16, proj_codevector_dim=16
    ),
    "videomae": video(),
    "timesformer": video(),
    "audio-spectrogram-transformer": spectrogram(
        max_length=32, num_mel_bins=16, frequency_stride=8, time_stride=8
    ),
    "swin2sr": conv(
        32, image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    ),
    "dinov3_vit": vision(),
    "dinov3_convnext": conv(**_STAGES),
    "mamba2": decoder(state_size=8, num_heads=8, head_dim=16, n_groups=1, chunk_size=8),
    "rwkv": decoder(),
    "gpt_oss": decoder(**_MOE, head_dim=16),
    "ibert": text(),
    "lfm2": decoder(),
}

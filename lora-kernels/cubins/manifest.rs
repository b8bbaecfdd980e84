// Do not edit: write the images in lora-kernels/cubins anew: LORA_PREBUILD=1 .ci/cuda cargo test -p lora-kernels --features cuda --lib prebuilt
&[
    Prebuilt { module: "activation", source: 0xf1aefe2dc070a568, images: &[
        ("sm_80", include_bytes!("activation.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("activation.sm_90a.cubin.z")),
        ("ptx", include_bytes!("activation.ptx.z")),
    ] },
    Prebuilt { module: "adamw", source: 0xab44432402592ac4, images: &[
        ("sm_80", include_bytes!("adamw.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("adamw.sm_90a.cubin.z")),
        ("ptx", include_bytes!("adamw.ptx.z")),
    ] },
    Prebuilt { module: "attention", source: 0xd7ab88b4c1a0c928, images: &[
        ("sm_80", include_bytes!("attention.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("attention.sm_90a.cubin.z")),
        ("ptx", include_bytes!("attention.ptx.z")),
    ] },
    Prebuilt { module: "attention_backward", source: 0x4786bd21353cd650, images: &[
        ("sm_80", include_bytes!("attention_backward.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("attention_backward.sm_90a.cubin.z")),
        ("ptx", include_bytes!("attention_backward.ptx.z")),
    ] },
    Prebuilt { module: "attention_cached", source: 0xb920d7fc862701ae, images: &[
        ("sm_80", include_bytes!("attention_cached.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("attention_cached.sm_90a.cubin.z")),
        ("ptx", include_bytes!("attention_cached.ptx.z")),
    ] },
    Prebuilt { module: "columns", source: 0x09bff6dab7b0e1fc, images: &[
        ("sm_80", include_bytes!("columns.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("columns.sm_90a.cubin.z")),
        ("ptx", include_bytes!("columns.ptx.z")),
    ] },
    Prebuilt { module: "dropout", source: 0x7cc8a77ed8bf6fd8, images: &[
        ("sm_80", include_bytes!("dropout.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("dropout.sm_90a.cubin.z")),
        ("ptx", include_bytes!("dropout.ptx.z")),
    ] },
    Prebuilt { module: "elementwise", source: 0xbd9cb01c62d9ae81, images: &[
        ("sm_80", include_bytes!("elementwise.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("elementwise.sm_90a.cubin.z")),
        ("ptx", include_bytes!("elementwise.ptx.z")),
    ] },
    Prebuilt { module: "gather", source: 0x9228c0efba462a9e, images: &[
        ("sm_80", include_bytes!("gather.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("gather.sm_90a.cubin.z")),
        ("ptx", include_bytes!("gather.ptx.z")),
    ] },
    Prebuilt { module: "gemm_mma_bf16", source: 0xfabffe5468874d80, images: &[
        ("sm_80", include_bytes!("gemm_mma_bf16.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("gemm_mma_bf16.sm_90a.cubin.z")),
        ("ptx", include_bytes!("gemm_mma_bf16.ptx.z")),
    ] },
    Prebuilt { module: "gemm_mma_f16", source: 0xfebcdb04846deae4, images: &[
        ("sm_80", include_bytes!("gemm_mma_f16.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("gemm_mma_f16.sm_90a.cubin.z")),
        ("ptx", include_bytes!("gemm_mma_f16.ptx.z")),
    ] },
    Prebuilt { module: "gemm_mma_tf32", source: 0x1307b62286f5f5fb, images: &[
        ("sm_80", include_bytes!("gemm_mma_tf32.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("gemm_mma_tf32.sm_90a.cubin.z")),
        ("ptx", include_bytes!("gemm_mma_tf32.ptx.z")),
    ] },
    Prebuilt { module: "gemm_simt", source: 0xd62be187ba10b8bd, images: &[
        ("sm_80", include_bytes!("gemm_simt.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("gemm_simt.sm_90a.cubin.z")),
        ("ptx", include_bytes!("gemm_simt.ptx.z")),
    ] },
    Prebuilt { module: "gemv", source: 0xfb6d4dbefc449987, images: &[
        ("sm_80", include_bytes!("gemv.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("gemv.sm_90a.cubin.z")),
        ("ptx", include_bytes!("gemv.ptx.z")),
    ] },
    Prebuilt { module: "wgmma_nn", source: 0x45eb3933e89c262f, images: &[
        ("sm_90a", include_bytes!("wgmma_nn.sm_90a.cubin.z")),
    ] },
    Prebuilt { module: "wgmma_nt", source: 0xa9ab6a0acd66f3d6, images: &[
        ("sm_90a", include_bytes!("wgmma_nt.sm_90a.cubin.z")),
    ] },
    Prebuilt { module: "wgmma_tn", source: 0x45b83ee8c1e8abcc, images: &[
        ("sm_90a", include_bytes!("wgmma_tn.sm_90a.cubin.z")),
    ] },
    Prebuilt { module: "lora_bf16", source: 0xc8489970143ffadd, images: &[
        ("sm_80", include_bytes!("lora_bf16.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("lora_bf16.sm_90a.cubin.z")),
        ("ptx", include_bytes!("lora_bf16.ptx.z")),
    ] },
    Prebuilt { module: "lora_f16", source: 0xd9e3fc153f07befa, images: &[
        ("sm_80", include_bytes!("lora_f16.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("lora_f16.sm_90a.cubin.z")),
        ("ptx", include_bytes!("lora_f16.ptx.z")),
    ] },
    Prebuilt { module: "lora_f32", source: 0x1da3037efb4eff30, images: &[
        ("sm_80", include_bytes!("lora_f32.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("lora_f32.sm_90a.cubin.z")),
        ("ptx", include_bytes!("lora_f32.ptx.z")),
    ] },
    Prebuilt { module: "loss", source: 0x385ac61c0e1047b4, images: &[
        ("sm_80", include_bytes!("loss.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("loss.sm_90a.cubin.z")),
        ("ptx", include_bytes!("loss.ptx.z")),
    ] },
    Prebuilt { module: "mix", source: 0xb9b8051ef6df125c, images: &[
        ("sm_80", include_bytes!("mix.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("mix.sm_90a.cubin.z")),
        ("ptx", include_bytes!("mix.ptx.z")),
    ] },
    Prebuilt { module: "norm", source: 0xed50dfd7d217abc3, images: &[
        ("sm_80", include_bytes!("norm.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("norm.sm_90a.cubin.z")),
        ("ptx", include_bytes!("norm.ptx.z")),
    ] },
    Prebuilt { module: "rope", source: 0x2839cbe3856a4e1b, images: &[
        ("sm_80", include_bytes!("rope.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("rope.sm_90a.cubin.z")),
        ("ptx", include_bytes!("rope.ptx.z")),
    ] },
    Prebuilt { module: "transpose", source: 0x40a44a215558e6e1, images: &[
        ("sm_80", include_bytes!("transpose.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("transpose.sm_90a.cubin.z")),
        ("ptx", include_bytes!("transpose.ptx.z")),
    ] },
]

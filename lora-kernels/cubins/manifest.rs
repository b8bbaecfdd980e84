// Do not edit: write the images in lora-kernels/cubins anew: LORA_PREBUILD=1 .ci/cuda cargo test -p lora-kernels --features cuda --lib prebuilt
&[
    Prebuilt { module: "activation", source: 0x37e22b65f60738f0, images: &[
        ("sm_80", include_bytes!("activation.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("activation.sm_90a.cubin.z")),
        ("ptx", include_bytes!("activation.ptx.z")),
    ] },
    Prebuilt { module: "adamw", source: 0xab44432402592ac4, images: &[
        ("sm_80", include_bytes!("adamw.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("adamw.sm_90a.cubin.z")),
        ("ptx", include_bytes!("adamw.ptx.z")),
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
    Prebuilt { module: "gather", source: 0x71bfa2da4fe65778, images: &[
        ("sm_80", include_bytes!("gather.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("gather.sm_90a.cubin.z")),
        ("ptx", include_bytes!("gather.ptx.z")),
    ] },
    Prebuilt { module: "loss", source: 0x385ac61c0e1047b4, images: &[
        ("sm_80", include_bytes!("loss.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("loss.sm_90a.cubin.z")),
        ("ptx", include_bytes!("loss.ptx.z")),
    ] },
    Prebuilt { module: "norm", source: 0x027247bdcc320cfd, images: &[
        ("sm_80", include_bytes!("norm.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("norm.sm_90a.cubin.z")),
        ("ptx", include_bytes!("norm.ptx.z")),
    ] },
    Prebuilt { module: "rope", source: 0x2839cbe3856a4e1b, images: &[
        ("sm_80", include_bytes!("rope.sm_80.cubin.z")),
        ("sm_90a", include_bytes!("rope.sm_90a.cubin.z")),
        ("ptx", include_bytes!("rope.ptx.z")),
    ] },
]

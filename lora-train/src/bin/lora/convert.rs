//! `lora convert`.

use std::path::PathBuf;

use clap::Args;
use indicatif::{HumanBytes, HumanCount};
use lora_kernels::Device;
use lora_model::{
    convert::{self, Llama2c, Vocabulary},
    tokenizer::Tokenizer,
};
use serde_json::json;

use crate::{
    new_folder::{NewFolder, go_on, size},
    ui,
};

#[derive(Args)]
pub(crate) struct ConvertArgs {
    /// File of the weights
    #[arg(value_name = "FILE")]
    weights: PathBuf,
    /// Its format: llama2.c, version 0 of `export.py` (.bin)
    #[arg(long, value_name = "FORMAT", value_parser = ["llama2.c"])]
    from: String,
    /// File of its vocabulary, as `tokenizer.py` of llama2.c writes it (.bin)
    #[arg(long, value_name = "FILE")]
    tokenizer: PathBuf,
    /// Folder for the model as Hugging Face has it: new, or empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print a summary as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: ConvertArgs) -> anyhow::Result<()> {
    let out = &args.out;
    let folder = NewFolder::new(out)?;
    let model = Llama2c::open(&args.weights)?;
    let vocabulary = Vocabulary::open(&args.tokenizer, model.config().vocab_size)?;
    let bytes = folder.write(|dir| {
        convert::write(&model, &vocabulary, dir)?;
        go_on()?;
        lora_model::load(dir, &Device::Cpu)?;
        Tokenizer::from_dir(dir)?;
        size(dir)
    })?;
    let (config, tensors) = (model.config(), model.tensors());
    let parameters = config.parameters() as u64;
    ui::say(format_args!(
        "converted {} parameters in {tensors} tensors; {} in {}",
        HumanCount(parameters),
        HumanBytes(bytes),
        out.display()
    ));
    let architecture = config.kind.model_type();
    match args.json {
        true => ui::print_json(&json!({
            "out": out,
            "architecture": architecture,
            "parameters": parameters,
            "vocab_size": config.vocab_size,
            "tensors": tensors,
            "bytes": bytes,
        })),
        false => Ok(()),
    }
}

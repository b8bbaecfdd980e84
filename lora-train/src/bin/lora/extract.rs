//! `lora extract`.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use indicatif::HumanBytes;
use lora_kernels::Device;
use lora_model::{
    LoadOptions,
    adapter::{Extraction, extract},
    config::RawConfig,
};
use lora_train::{hub, tables::columns};
use serde_json::json;

use crate::{
    new_folder::{NewFolder, size},
    ui,
};

#[derive(Args)]
pub(crate) struct ExtractArgs {
    /// Folder of the base, or its id on the Hugging Face hub
    #[arg(long, value_name = "DIR|HUB_ID")]
    model: PathBuf,
    /// Folder of the model that was fine-tuned from it, or its id
    #[arg(long, value_name = "DIR|HUB_ID")]
    tuned: PathBuf,
    /// Rank of the adapter
    #[arg(long, value_name = "R")]
    rank: usize,
    /// Names of modules to adapt, or the ends of them [default: all linear maps that changed, but the output head]
    #[arg(long, value_delimiter = ',', value_name = "NAME,...")]
    targets: Vec<String>,
    /// Folder for the adapter: new, or empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Print what each module's update leaves out, and all else that the adapter does not hold, as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: ExtractArgs) -> anyhow::Result<()> {
    let folder = NewFolder::new(&args.out)?;
    let (base_dir, tuned_dir) = (hub::resolve(&args.model)?, hub::resolve(&args.tuned)?);
    // The base with the head of the tuned model, which the adapter takes over whole.
    let raw = RawConfig::from_dir(&tuned_dir)?;
    let task = (raw.architecture()?.task)(&raw)?;
    let tuned = lora_model::load(&tuned_dir, &Device::Cpu)?;
    let options = LoadOptions { task, head_follows: true, ..LoadOptions::default() };
    let base = lora_model::load_with(&base_dir, &Device::Cpu, &options)?;
    let bar = ui::counter(base.outline().linear_sites().count() as u64, "weights");
    let extracted = extract(&*base, &*tuned, args.rank, &args.targets, &|_| bar.inc(1));
    bar.finish_and_clear();
    let mut extraction =
        extracted.with_context(|| format!("{} from {}", args.tuned.display(), args.model.display()))?;
    extraction.updates.base_model_name_or_path = Some(args.model.to_string_lossy().into_owned());
    let bytes = folder.write(|dir| {
        extraction.updates.save(dir)?;
        size(dir)
    })?;
    let (within, of_all) = (extraction.relative_error(), extraction.relative_error_of_all());
    ui::say(format_args!(
        "extracted rank {} on {} modules: {:.2}% of their change is left out, {:.2}% of all change; {} in {}",
        extraction.updates.rank(),
        extraction.modules.len(),
        100.0 * within,
        100.0 * of_all,
        HumanBytes(bytes),
        args.out.display()
    ));
    match args.json {
        false => ui::print(table(&extraction)),
        true => {
            let modules = extraction.modules.iter().map(|(name, m)| {
                let relative = if m.change > 0.0 { m.error / m.change } else { 0.0 };
                json!({"module": name, "base": m.base, "change": m.change, "error": m.error, "relative_error": relative})
            });
            let left = extraction.left.iter().map(|(name, norm)| json!({"tensor": name, "change": norm}));
            let kept_whole: Vec<&String> = extraction.updates.whole.keys().collect();
            ui::print_json(&json!({
                "out": args.out,
                "rank": extraction.updates.rank(),
                "targets": extraction.updates.targets,
                "relative_error": within,
                "relative_error_of_all": of_all,
                "modules": modules.collect::<Vec<_>>(),
                "left": left.collect::<Vec<_>>(),
                "whole": kept_whole,
                "bytes": bytes,
            }))
        }
    }
}

/// The modules with what their updates leave, and what changed beside them.
fn table(extraction: &Extraction) -> String {
    let percent = |part: f64, of: f64| if of > 0.0 { format!("{:.3}%", 100.0 * part / of) } else { "-".to_owned() };
    let mut rows = vec![["module", "‖ΔW‖", "of ‖W‖", "left out", "of ‖ΔW‖"].map(str::to_owned).to_vec()];
    for (name, m) in &extraction.modules {
        let (change, error) = (format!("{:.4}", m.change), format!("{:.4}", m.error));
        rows.push(vec![name.clone(), change, percent(m.change, m.base), error, percent(m.error, m.change)]);
    }
    let mut text = columns(&rows);
    if !extraction.updates.whole.is_empty() {
        let names: Vec<&str> = extraction.updates.whole.keys().map(String::as_str).collect();
        text += &format!("\nheld whole: {}\n", names.join(", "));
    }
    if !extraction.left.is_empty() {
        let mut rows = vec![["changed, and not in the adapter", "‖change‖"].map(str::to_owned).to_vec()];
        rows.extend(extraction.left.iter().map(|(name, norm)| vec![name.clone(), format!("{norm:.4}")]));
        text += &format!("\n{}", columns(&rows));
    }
    text
}

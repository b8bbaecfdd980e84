//! `lora analyze`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use lora_model::{
    adapter::{Updates, Weighted, check_one_base},
    files,
};
use lora_train::{
    analysis::{Analysis, analyse},
    tables::columns,
    task::{self, Fitted},
};

use crate::{base, new_folder::NewFolder, ui};

#[derive(Args)]
pub(crate) struct AnalyzeArgs {
    /// Folder of a LoRA adapter
    #[arg(value_name = "ADAPTER")]
    adapter: PathBuf,
    /// The base that it belongs to, for ‖ΔW‖/‖W‖ and the amplification factor of section 7.3
    #[arg(long, value_name = "DIR|HUB_ID")]
    model: Option<PathBuf>,
    /// Another adapter, of another rank or seed, for the similarity φ(i, j) of their subspaces (section 7.2)
    #[arg(long, value_name = "DIR")]
    against: Option<PathBuf>,
    /// Refuse a base or another adapter that is not of the base that the adapter was trained on, rather than warn of it
    #[arg(long)]
    strict: bool,
    /// Folder, new or empty, for analysis.json and the pictures: singular_values.svg, and with --against similarity_a.svg and _b.svg
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Print all measures as JSON, singular values and every φ(i, j) included
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: AnalyzeArgs) -> anyhow::Result<()> {
    let folder = args.out.as_deref().map(NewFolder::new).transpose()?;
    let adapter = Updates::load(&args.adapter)?;
    let against = args.against.as_deref().map(Updates::load).transpose()?;
    let loaded = match &args.model {
        None => None,
        Some(model) => {
            let task = task::of_adapter(&args.adapter)?;
            Some(base::load_with_head(model, task.as_ref().map(Fitted::head), true)?)
        }
    };
    let mut same_base = loaded.as_ref().map_or(Ok(()), |l| adapter.check_same_base(&*l.model));
    if let (Ok(()), Some(other)) = (&same_base, &against) {
        let [one, other] = [(&args.adapter, &adapter), (args.against.as_ref().unwrap_or(&args.adapter), other)]
            .map(|(dir, updates)| Weighted { name: dir.display().to_string(), weight: 1.0, updates: updates.clone() });
        same_base = check_one_base(&[one, other]);
    }
    if args.strict {
        let others = args.against.iter().zip(&against);
        for (dir, updates) in others.chain([(&args.adapter, &adapter)]) {
            base::say_unchecked(dir, updates.base_fingerprint.as_deref());
        }
    }
    match same_base {
        Err(e) if args.strict => return Err(e).context("--strict"),
        Err(e) => tracing::warn!("{e}"),
        Ok(()) => {}
    }
    let shown = |what: &Option<PathBuf>, word: &str| {
        what.as_ref().map_or(String::new(), |w| format!(" {word} {}", w.display()))
    };
    let analysis = analyse(&adapter, loaded.as_ref().map(|l| l.model.as_ref() as _), against.as_ref());
    let analysis = analysis.with_context(|| {
        format!("{}{}{}", args.adapter.display(), shown(&args.model, "on"), shown(&args.against, "against"))
    })?;
    if !analysis.not_compared.is_empty() {
        let n = analysis.not_compared.len();
        ui::note(format_args!("{n} of {} modules are not in the other adapter", analysis.modules.len()));
    }
    if let (Some(folder), Some(out)) = (folder, &args.out) {
        folder.write(|dir| write(dir, out, &analysis))?;
    }
    if args.json { ui::print_json(&analysis) } else { ui::print(table(&analysis)) }
}

/// Writes into `dir`, which is going to be `out`.
fn write(dir: &Path, out: &Path, analysis: &Analysis) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(analysis)?;
    files::write_bytes(&dir.join("analysis.json"), format!("{text}\n").as_bytes())?;
    let pictures = analysis.pictures();
    for (name, svg) in &pictures {
        files::write_bytes(&dir.join(name), svg.as_bytes())?;
    }
    let names: Vec<&str> = pictures.iter().map(|(name, _)| *name).collect();
    ui::say(format_args!(
        "{} in {}",
        std::iter::once("analysis.json").chain(names).collect::<Vec<_>>().join(", "),
        out.display()
    ));
    Ok(())
}

/// A line for each module: only columns that were measured.
fn table(analysis: &Analysis) -> String {
    let with_base = analysis.modules.values().any(|m| m.against_base.is_some());
    let compared = analysis.modules.values().any(|m| m.similarity.is_some());
    let mut head = vec!["module", "r", "scale", "effective", "σ₁", "σᵣ", "‖ΔW‖"];
    if with_base {
        head.extend(["of ‖W‖", "‖UᵀWV‖", "amplified"]);
    }
    if compared {
        head.extend(["φ_A(1,1)", "φ_A(r,r')", "φ_B(1,1)", "φ_B(r,r')"]);
    }
    let mut rows = vec![head.into_iter().map(str::to_owned).collect::<Vec<_>>()];
    let number = |x: Option<f64>, digits: usize| x.map_or("-".to_owned(), |x| format!("{x:.digits$}"));
    for (name, m) in &analysis.modules {
        let mut row = vec![name.clone(), m.rank.to_string(), format!("{}", (m.scale * 1e4).round() / 1e4)];
        let sigma = &m.singular_values;
        row.push(number(Some(m.effective_rank), 2));
        row.extend([sigma.first(), sigma.last(), Some(&m.delta_norm)].map(|x| number(x.copied(), 4)));
        if with_base {
            let b = m.against_base;
            row.push(b.map_or("-".to_owned(), |b| format!("{:.3}%", 100.0 * b.relative_norm)));
            row.extend([number(b.and_then(|b| b.projected_norm), 4), number(b.and_then(|b| b.amplification), 2)]);
        }
        if compared {
            let ([a1, b1], [a, b]) = (m.first_similarity(), m.whole_similarity());
            row.extend([a1, a, b1, b].map(|x| number(x, 3)));
        }
        rows.push(row);
    }
    columns(&rows)
}

//! What people see: messages and progress on standard error, results on standard output.

use std::{
    fmt,
    io::{self, IsTerminal, Write},
    path::Path,
    process::ExitCode,
    sync::{
        LazyLock, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use indicatif::{HumanCount, HumanDuration, MultiProgress, ProgressBar, ProgressStyle};
use lora_train::{Evaluation, Observer, RunInfo, Step, Summary};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    EnvFilter,
    fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter, format::Writer},
    registry::LookupSpan,
};

use crate::Global;

/// All progress bars: whatever else is written to the terminal goes through here, so that it tears none of them. Nothing
/// is drawn where standard error is no terminal.
static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);
static QUIET: AtomicBool = AtomicBool::new(false);
static NO_PROGRESS: AtomicBool = AtomicBool::new(false);

/// Exit code after Ctrl-C, as shells have it: 128 + SIGINT.
pub(crate) const INTERRUPTED: u8 = 130;
/// Exit code when the reader of the results has gone: 128 + SIGPIPE.
const BROKEN_PIPE: u8 = 141;

/// The work was stopped by Ctrl-C, and has said what became of it.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// Sets up messages of the libraries: warnings and worse, unless more (or less) is asked for. RUST_LOG wins over
/// `verbose`, `quiet` over both.
pub(crate) fn init(global: &Global) {
    let quiet = global.quiet;
    QUIET.store(quiet, Ordering::Relaxed);
    NO_PROGRESS.store(quiet || global.no_progress, Ordering::Relaxed);
    let level = match (quiet, global.verbose) {
        (true, _) => "error",
        (_, 0) => "warn",
        (_, 1) => "warn,lora=info,lora_train=info,lora_model=info",
        _ => "debug",
    };
    let asked = EnvFilter::try_from_default_env().ok().filter(|_| !quiet);
    let filter = asked.unwrap_or_else(|| EnvFilter::new(level));
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).event_format(Plain).with_writer(ToBars).init();
}

/// `warning: message`, as this program's own messages look.
struct Plain;

impl<S, N> FormatEvent<S, N> for Plain
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut w: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let label = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        write!(w, "{label}: ")?;
        ctx.format_fields(w.by_ref(), event)?;
        writeln!(w)
    }
}

struct ToBars;

impl MakeWriter<'_> for ToBars {
    type Writer = ToBars;

    fn make_writer(&self) -> ToBars {
        ToBars
    }
}

impl Write for ToBars {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A message that nobody can read is no reason to stop: a full disk or a closed pipe behind standard error.
        let _ = BARS.suspend(|| io::stderr().write_all(bytes));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// A line of what goes on, for a person, on standard error.
pub(crate) fn say(line: impl fmt::Display) {
    if shows_progress() {
        say_always(line);
    }
}

/// Something that a person should know, with or without progress.
pub(crate) fn note(message: impl fmt::Display) {
    if !QUIET.load(Ordering::Relaxed) {
        say_always(format_args!("note: {message}"));
    }
}

fn shows_progress() -> bool {
    !NO_PROGRESS.load(Ordering::Relaxed)
}

fn say_always(line: impl fmt::Display) {
    // Nobody is there to hear of a standard error that cannot be written.
    let _ = ToBars.write_all(format!("{line}\n").as_bytes());
}

/// Text on standard output.
pub(crate) fn print(text: impl fmt::Display) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    let written = write!(out, "{text}").and_then(|()| out.flush());
    written.map_err(|e| anyhow::Error::new(e).context("could not write to standard output"))
}

/// An object on standard output.
pub(crate) fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(format_args!("{}\n", serde_json::to_string(value)?))
}

/// Tells of an error in one paragraph, and gives the exit code.
pub(crate) fn report(e: &anyhow::Error) -> ExitCode {
    if e.is::<Interrupted>() {
        return INTERRUPTED.into();
    }
    if e.chain().any(|c| c.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)) {
        return BROKEN_PIPE.into();
    }
    say_always(format_args!("error: {}", paragraph(e)));
    if matches!(e.downcast_ref(), Some(lora_train::Error::Diverged { .. } | lora_train::Error::NotFinite { .. })) {
        return lora_train::compare::DIVERGED.into();
    }
    ExitCode::FAILURE
}

/// The error and its causes, without those that the message before already holds.
fn paragraph(e: &anyhow::Error) -> String {
    let mut text = e.to_string();
    let mut cause = e.source();
    while let Some(c) = cause {
        let message = c.to_string();
        if !text.contains(&message) {
            text = format!("{text}: {message}");
        }
        cause = c.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Raised by Ctrl-C, for work that stops in good order.
static STOP: AtomicBool = AtomicBool::new(false);

/// From now on the first Ctrl-C makes [`interrupted`] true and says what `happens` then, and the second ends the process.
pub(crate) fn catch_interrupt(happens: &'static str) -> anyhow::Result<()> {
    static CAUGHT: OnceLock<Result<(), ctrlc::Error>> = OnceLock::new();
    let handler = move || {
        if STOP.swap(true, Ordering::SeqCst) {
            std::process::exit(INTERRUPTED.into());
        }
        say(format_args!("interrupted: {happens} (Ctrl-C again to stop at once)"));
    };
    match CAUGHT.get_or_init(|| ctrlc::set_handler(handler)) {
        Ok(()) => Ok(()),
        Err(e) => Err(anyhow::anyhow!("could not listen to Ctrl-C: {e}")),
    }
}

/// Whether Ctrl-C was pressed since [`catch_interrupt`].
pub(crate) fn interrupted() -> bool {
    STOP.load(Ordering::SeqCst)
}

/// A bar that counts up to `total`, gone when it is dropped.
pub(crate) fn counter(total: u64, what: &str) -> ProgressBar {
    if !shows_progress() {
        return ProgressBar::hidden();
    }
    let bar = BARS.add(ProgressBar::new(total));
    bar.set_style(style(&format!("{{bar:30}} {{pos}}/{{len}} {what}  {{eta}} left")));
    bar
}

fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.progress_chars("━╸─")
}

/// Watches a run: a bar on a terminal, else a line about once a second.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    steps: u64,
    /// Smoothed tokens per second.
    rate: f64,
    began: Instant,
    /// Steps of earlier lives of the run.
    done: u64,
    spoke: Option<Instant>,
}

impl Progress {
    /// For one run, which Ctrl-C then stops in good order.
    pub(crate) fn new() -> anyhow::Result<Progress> {
        catch_interrupt("saving after this step")?;
        Ok(Progress { bar: None, steps: 0, rate: 0.0, began: Instant::now(), done: 0, spoke: None })
    }

    fn left(&self, step: u64) -> Duration {
        let per_step = self.began.elapsed().as_secs_f64() / (step - self.done).max(1) as f64;
        Duration::from_secs_f64(per_step * (self.steps - step) as f64)
    }
}

impl Observer for Progress {
    fn start(&mut self, info: &RunInfo) {
        let RunInfo { trainable, base, sequences, steps, done } = *info;
        let share = 100.0 * trainable as f64 / base as f64;
        let plural = if steps == 1 { "" } else { "s" };
        say(format_args!(
            "training {} parameters ({share:.3}% of the base's {}) on {} sequences for {steps} step{plural}",
            HumanCount(trainable as u64),
            HumanCount(base as u64),
            HumanCount(sequences as u64),
        ));
        (self.steps, self.done, self.began) = (steps, done, Instant::now());
        if io::stderr().is_terminal() && shows_progress() {
            let bar = BARS.add(ProgressBar::new(steps).with_position(done));
            bar.set_style(style("{bar:30} {pos}/{len}  {msg}"));
            self.bar = Some(bar);
        }
    }

    fn step(&mut self, step: &Step, tokens_per_s: f64) {
        self.rate = if self.rate == 0.0 { tokens_per_s } else { 0.9 * self.rate + 0.1 * tokens_per_s };
        let last = step.step == self.steps;
        let state = format!(
            "loss {:.4}  {} tokens/s  {} left",
            step.loss,
            HumanCount(self.rate as u64),
            HumanDuration(self.left(step.step))
        );
        match &self.bar {
            Some(bar) => {
                bar.set_position(step.step);
                bar.set_message(state);
                if last {
                    bar.finish_and_clear();
                }
            }
            None if last || self.spoke.is_none_or(|at| at.elapsed() >= Duration::from_secs(1)) => {
                self.spoke = Some(Instant::now());
                say(format_args!("step {}/{}  {state}", step.step, self.steps));
            }
            None => {}
        }
    }

    fn evaluation(&mut self, step: u64, e: &Evaluation) {
        say(format_args!("step {step}: validation loss {:.4}{}", e.loss, judged(e)));
    }

    fn checkpoint(&mut self, path: &Path) {
        tracing::info!("saved {}", path.display());
    }

    fn note(&mut self, message: &str) {
        note(message);
    }

    fn stop(&mut self) -> bool {
        interrupted()
    }
}

/// Ends the story of a run: what it did on standard error, with `json` as an object on standard output too.
pub(crate) fn finish(summary: &Summary, what: &str, json: bool) -> anyhow::Result<()> {
    if summary.interrupted {
        say(format_args!(
            "interrupted after step {}; saved {}: continue with --resume",
            summary.steps,
            summary.out.display()
        ));
        return Err(Interrupted.into());
    }
    let plural = if summary.steps == 1 { "" } else { "s" };
    let mut line =
        format!("{} step{plural} in {}", summary.steps, HumanDuration(Duration::from_secs_f64(summary.spent.seconds)));
    if let Some(loss) = summary.loss {
        line += &format!(", loss {loss:.4}");
    }
    if let Some(e) = &summary.evaluation {
        line += &format!(", validation loss {:.4}{}", e.loss, judged(e));
    }
    say(format_args!("{line}; {what} in {}", summary.out.display()));
    if json { print_json(summary) } else { Ok(()) }
}

/// What stands behind a loss.
fn judged(e: &Evaluation) -> String {
    match e.perplexity {
        Some(perplexity) => format!(", perplexity {perplexity:.3}"),
        None => format!(", {}", e.scores),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_paragraph_without_repetition() {
        let inner = anyhow::anyhow!("no\nspace");
        let same = inner.context("file: no\nspace");
        assert_eq!(paragraph(&same), "file: no space");
        assert_eq!(paragraph(&same.context("while saving")), "while saving: file: no space");
    }
}

//! The output folder of a run: whose it is, and what in it can be continued.

use std::{
    fs::{File, TryLockError},
    path::{Path, PathBuf},
};

use lora_model::files;

use crate::{Error, Result, TrainConfig, checkpoint};

/// The file that marks an output folder as a run's, and holds its configuration.
pub const RUN_FILE: &str = "run.toml";

/// An output folder that this run may use.
pub(crate) struct Output {
    dir: PathBuf,
    /// The newest whole checkpoint to continue from.
    pub(crate) checkpoint: Option<PathBuf>,
    /// Checkpoints that were passed over, and why.
    pub(crate) notes: Vec<String>,
    /// The run that is continued, as it was configured.
    pub(crate) earlier: Option<TrainConfig>,
    /// Held as long as the run lives; `None` until the folder exists.
    lock: Option<File>,
}

impl Output {
    /// Makes sure that the folder is this run's. Makes nothing.
    ///
    /// # Errors
    /// [`Error::Output`] for a folder that holds another run or a model, or that another process is working in.
    pub(crate) fn open(config: &TrainConfig, resume: bool) -> Result<Output> {
        let dir = &config.out;
        if dir.as_os_str().is_empty() {
            return Err(Error::option("out", "", "name a folder for the result"));
        }
        let refuse = |problem: String| Err(Error::Output { dir: dir.clone(), problem });
        if dir.exists() && !dir.is_dir() {
            return refuse("is a file; --out is a folder".into());
        }
        let canonical = |p: &Path| p.canonicalize().ok();
        if dir.exists() && canonical(dir) == canonical(&config.model) {
            return refuse("is the base model's own folder, which is never written; choose another --out".into());
        }
        let lock = if dir.exists() { lock(dir)? } else { None };
        let holds = |name: &str| dir.join(name).exists();
        let mut output = Output { dir: dir.clone(), checkpoint: None, notes: Vec::new(), earlier: None, lock };
        let results = ["adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors"];
        let result = results.into_iter().find(|name| holds(name));
        if !resume {
            // A run that failed before it saved anything leaves its configuration alone, which is no loss.
            let checkpoints = !checkpoint::list(dir)?.is_empty();
            let held = result.or(checkpoints.then_some(checkpoint::FOLDER));
            return match held {
                Some(name) if holds(RUN_FILE) => {
                    refuse(format!("holds another run ({name}); continue it with --resume, or choose another --out"))
                }
                Some(name) => refuse(format!("holds {name} of something else; choose another --out")),
                None => Ok(output),
            };
        }
        if !holds(RUN_FILE) {
            return match result.or((!checkpoint::list(dir)?.is_empty()).then_some(checkpoint::FOLDER)) {
                Some(name) => {
                    refuse(format!("holds {name} but no {RUN_FILE}, so no run to resume; choose another --out"))
                }
                None => Ok(output),
            };
        }
        files::remove_temporary(dir)?;
        (output.checkpoint, output.notes) = checkpoint::newest(dir)?;
        let path = dir.join(RUN_FILE);
        let earlier = toml::from_str::<TrainConfig>(&files::read_to_string(&path)?)
            .map_err(|e| Error::Config { path: path.clone(), problem: e.message().to_owned() })?;
        if let Some((key, old, new)) = config.difference(&earlier) {
            return refuse(format!(
                "the run in it was started with {key} = {old}, and is to be continued with {new}; \
                 give the same value, or start anew in another folder"
            ));
        }
        output.earlier = Some(earlier);
        Ok(output)
    }

    /// Makes the folder and marks it as this run's.
    ///
    /// # Errors
    /// What writing can cause; [`Error::Output`] when another process took the folder meanwhile.
    pub(crate) fn claim(&mut self, config: &TrainConfig) -> Result<()> {
        files::create_folder(&self.dir)?;
        if self.lock.is_none() {
            self.lock = lock(&self.dir)?;
        }
        Ok(files::write_bytes(&self.dir.join(RUN_FILE), config.to_toml().as_bytes())?)
    }
}

/// Locks a folder for this process; `None` where the system has no such locks.
pub(crate) fn lock(dir: &Path) -> Result<Option<File>> {
    let Ok(file) = File::open(dir) else { return Ok(None) };
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => {
            let problem = "another process is working in it; wait for it, or choose another --out".into();
            Err(Error::Output { dir: dir.into(), problem })
        }
        Err(TryLockError::Error(_)) => Ok(None),
    }
}

//! What makes no sense in a run's configuration, whatever the model and the data.

use super::{LORAPLUS_LR_EMBEDDING, TrainConfig};
use crate::{Error, Place, Result};

impl TrainConfig {
    /// Refuses what makes no sense on any model or data, naming the option.
    ///
    /// # Errors
    /// [`Error::Option`].
    pub fn check(&self) -> Result<()> {
        let positive = |option, v: usize| match v {
            0 => Err(Error::option(option, v, "must be at least 1")),
            _ => Ok(()),
        };
        let within = |option, v: f64, lo: f64, hi: f64, why: &str| match v >= lo && v < hi {
            true => Ok(()),
            false => Err(Error::option(option, v, why)),
        };
        positive("batch-size", self.batch_size)?;
        positive("grad-accum", self.grad_accum)?;
        if self.grad_accum > self.batch_size {
            let why = format!("a batch of {} sequences cannot be split into more micro-batches", self.batch_size);
            return Err(Error::option("grad-accum", self.grad_accum, why));
        }
        if self.max_length < 2 {
            return Err(Error::option("max-length", self.max_length, "a sequence needs two tokens to predict one"));
        }
        within("hold-out", self.hold_out, 0.0, 1.0, "a share of the data is in [0, 1)")?;
        if self.hold_out > 0.0 && self.valid.is_some() {
            return Err(Error::option("hold-out", self.hold_out, "give either --valid or --hold-out, not both"));
        }
        within("lr", self.lr, f64::MIN_POSITIVE, 1e3, "a learning rate is a positive number, usually below 0.1")?;
        within("weight-decay", self.weight_decay, 0.0, 1e3, "weight decay is a number ≥ 0, usually below 1")?;
        if let Some(ratio) = self.loraplus_lr_ratio {
            const OPTION: &str = "loraplus-lr-ratio";
            within(
                OPTION,
                ratio,
                f64::MIN_POSITIVE,
                1e6,
                "a ratio of learning rates is a positive number, usually 2 to 32",
            )?;
            // LoRA's own options and AdaLoRA's, alone or in a combination.
            if !self.row()?.options.iter().any(|option| ["use-dora", "init-r"].contains(option)) {
                let why = format!("it is for methods with LoRA's B, and method {} has none; leave it out", self.method);
                return Err(Error::option(OPTION, ratio, why));
            }
        }
        const EMBEDDING: &str = "loraplus-lr-embedding";
        let why = "a learning rate is a number ≥ 0, usually far below that of other parameters";
        within(EMBEDDING, self.loraplus_lr_embedding, 0.0, 1e3, why)?;
        if self.loraplus_lr_ratio.is_none() && self.loraplus_lr_embedding != LORAPLUS_LR_EMBEDDING {
            let why = "it is a rate of LoRA+, and without loraplus-lr-ratio there is none; give both";
            return Err(Error::option(EMBEDDING, self.loraplus_lr_embedding, why));
        }
        within("beta1", self.beta1, 0.0, 1.0, "β₁ is in [0, 1)")?;
        within("beta2", self.beta2, 0.0, 1.0, "β₂ is in [0, 1)")?;
        // In f32, which it is used in, a smaller one is 0.
        within("eps", self.eps, f32::MIN_POSITIVE.into(), 1.0, "ε is a small positive number, from 1.2e-38")?;
        within("label-smoothing", self.label_smoothing, 0.0, 1.0, "label smoothing is in [0, 1)")?;
        // Whether or not the method reads them: checkpoints hold them.
        for (option, v) in [
            ("d-initial", self.d_initial),
            ("adalora-beta1", self.adalora_beta1),
            ("adalora-beta2", self.adalora_beta2),
            ("orth-reg-weight", self.orth_reg_weight),
        ] {
            if !v.is_finite() {
                return Err(Error::option(option, v, "is a finite number"));
            }
        }
        const LARGEST: u64 = i64::MAX as u64;
        for (option, v, most) in [
            ("steps", self.steps.unwrap_or(0), u64::from(u32::MAX)),
            ("warmup", self.warmup, u64::from(u32::MAX)),
            ("tinit", self.tinit, u64::from(u32::MAX)),
            ("tfinal", self.tfinal, u64::from(u32::MAX)),
            ("delta-t", self.delta_t, u64::from(u32::MAX)),
            ("total-step", self.total_step.unwrap_or(0), u64::from(u32::MAX)),
            ("seed", self.seed, LARGEST),
            ("projection-prng-key", self.projection_prng_key, LARGEST),
            ("save-every", self.save_every, LARGEST),
            ("eval-every", self.eval_every, LARGEST),
        ] {
            if v > most {
                return Err(Error::option(option, v, format!("is at most {most}")));
            }
        }
        for (option, v) in [
            ("rank", self.rank),
            ("bottleneck", self.bottleneck),
            ("batch-size", self.batch_size),
            ("max-length", self.max_length),
            ("keep", self.keep),
            ("prefix", self.prefix),
            ("infix", self.infix),
            ("reparam", self.reparam),
            ("init-r", self.init_r),
            ("target-r", self.target_r),
        ] {
            if v > u32::MAX as usize {
                return Err(Error::option(option, v, format!("is at most {}", u32::MAX)));
            }
        }
        // They are written down in TOML and JSON.
        let paths = [("model", &self.model), ("data", &self.data), ("out", &self.out)].map(|(o, p)| (o, Some(p)));
        let others = [("valid", &self.valid), ("init-adapter", &self.init_adapter), ("log", &self.log)];
        let fused = self.fuse.iter().map(|p| ("fuse", Some(p)));
        for (option, path) in paths.into_iter().chain(others.map(|(o, p)| (o, p.as_ref()))).chain(fused) {
            if let Some(path) = path.filter(|p| p.to_str().is_none()) {
                return Err(Error::option(option, path.display(), "is not UTF-8; rename it"));
            }
        }
        // What an adapter's file may say.
        within("alpha", self.alpha, f64::MIN_POSITIVE, 1e9f64.next_up(), "α is a positive number of at most 1e9")?;
        if self.init_adapter.is_some() && self.row()?.whole_model {
            return Err(Error::option("init-adapter", "given", format!("method {} has no adapter", self.method)));
        }
        within("clip", self.clip, 0.0, 1e30, "the largest gradient norm is a number ≥ 0; 0 is no limit")?;
        within("dropout", self.dropout, 0.0, 1.0, "a dropout rate is in [0, 1)")?;
        if let Some(p) = self.base_dropout {
            within("base-dropout", p, 0.0, 1.0, "a dropout rate is in [0, 1)")?;
        }
        match (self.epochs, self.steps) {
            (Some(e), Some(_)) => {
                return Err(Error::option("epochs", e, "give either --epochs or --steps, not both"));
            }
            (Some(e), None) => {
                within("epochs", e, f64::MIN_POSITIVE, 1e9, "a number of epochs is positive, and below 1e9")?
            }
            (None, Some(0)) => return Err(Error::option("steps", 0, "must be at least 1")),
            _ => {}
        }
        Place::check(&self.device, &self.dtype)?;
        self.task_row()?;
        self.method_options()?;
        Ok(())
    }
}

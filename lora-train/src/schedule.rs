//! Learning-rate schedules, as in Transformers' `get_{constant,linear,cosine}_schedule_with_warmup`.

use std::{f64::consts::PI, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// How the learning rate changes over a run.
///
/// With `w` steps of warm-up and `n` steps in all, step `k` (from 0) has the learning rate `lr · factor(k)`:
///
/// ```text
/// k < w      k / w
/// constant   1
/// linear     (n - k) / (n - w)
/// cosine     (1 + cos(π (k - w) / (n - w))) / 2
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// After the warm-up, the full rate.
    Constant,
    /// After the warm-up, a straight line to 0 at the end of the run.
    #[default]
    Linear,
    /// After the warm-up, half a wave of the cosine down to 0 at the end of the run.
    Cosine,
}

impl Schedule {
    /// Every schedule, in the order of the documentation.
    pub const ALL: [Schedule; 3] = [Schedule::Constant, Schedule::Linear, Schedule::Cosine];

    /// What the learning rate is multiplied by at step `step` (from 0) of `steps`, after `warmup` steps of warm-up.
    ///
    /// The first step of a warm-up has the factor 0, as in Transformers.
    pub fn factor(self, step: u64, warmup: u64, steps: u64) -> f64 {
        if step < warmup {
            return step as f64 / warmup as f64;
        }
        let decay = steps.saturating_sub(warmup).max(1) as f64;
        match self {
            Schedule::Constant => 1.0,
            Schedule::Linear => steps.saturating_sub(step) as f64 / decay,
            Schedule::Cosine => {
                let progress = (step - warmup) as f64 / decay;
                (0.5 * (1.0 + (PI * progress).cos())).max(0.0)
            }
        }
    }

    /// What a user should hear before such a run starts.
    pub fn check(self, warmup: u64, steps: u64) -> Option<Warning> {
        (warmup > 0 && warmup >= steps).then(|| Warning::WarmupTooLong {
            warmup,
            steps,
            peak: self.factor(steps.saturating_sub(1), warmup, steps),
        })
    }

    /// The name on the command line and in configuration files.
    pub fn name(self) -> &'static str {
        match self {
            Schedule::Constant => "constant",
            Schedule::Linear => "linear",
            Schedule::Cosine => "cosine",
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The name is none of the [`Schedule`]s.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown schedule '{0}': use constant, linear or cosine")]
pub struct UnknownSchedule(
    /// What was asked for.
    pub String,
);

impl FromStr for Schedule {
    type Err = UnknownSchedule;

    fn from_str(name: &str) -> Result<Schedule, UnknownSchedule> {
        Schedule::ALL.into_iter().find(|s| s.name() == name).ok_or_else(|| UnknownSchedule(name.to_owned()))
    }
}

/// A schedule that can run, though hardly as meant. Its text is for the user.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Warning {
    /// The warm-up does not end within the run.
    WarmupTooLong {
        /// Steps of warm-up.
        warmup: u64,
        /// Steps of the run.
        steps: u64,
        /// The largest factor that is reached.
        peak: f64,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Warning::WarmupTooLong { warmup, steps, peak } = self;
        let percent = 100.0 * peak;
        write!(
            f,
            "the warm-up of {warmup} steps does not end within the run of {steps}: the learning rate never passes \
             {percent:.1}% of the one asked for; shorten the warm-up or lengthen the run"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `get_*_schedule_with_warmup` of Transformers 5, in f64.
    #[rustfmt::skip]
    const FACTORS: &[(Schedule, u64, u64, &[f64])] = &[
        (Schedule::Constant, 0, 3, &[1.0, 1.0, 1.0]),
        (Schedule::Constant, 4, 6, &[0.0, 0.25, 0.5, 0.75, 1.0, 1.0]),
        (Schedule::Linear, 0, 3, &[1.0, 0.6666666666666666, 0.3333333333333333, 0.0, 0.0]),
        (Schedule::Linear, 3, 10, &[
            0.0, 0.3333333333333333, 0.6666666666666666, 1.0, 0.8571428571428571, 0.7142857142857143,
            0.5714285714285714, 0.42857142857142855, 0.2857142857142857, 0.14285714285714285, 0.0, 0.0,
        ]),
        (Schedule::Linear, 7, 5, &[
            0.0, 0.14285714285714285, 0.2857142857142857, 0.42857142857142855, 0.5714285714285714,
            0.7142857142857143, 0.8571428571428571,
        ]),
        (Schedule::Cosine, 0, 4, &[1.0, 0.8535533905932737, 0.5, 0.14644660940672627, 0.0, 0.14644660940672616]),
        (Schedule::Cosine, 3, 10, &[
            0.0, 0.3333333333333333, 0.6666666666666666, 1.0, 0.9504844339512095, 0.8117449009293668,
            0.6112604669781572, 0.38873953302184283, 0.18825509907063326, 0.04951556604879048, 0.0,
        ]),
    ];

    #[test]
    fn factors_are_those_of_transformers() {
        for &(schedule, warmup, steps, factors) in FACTORS {
            for (step, &factor) in factors.iter().enumerate() {
                let ours = schedule.factor(step as u64, warmup, steps);
                assert!((ours - factor).abs() < 1e-15, "{schedule} {warmup}/{steps} at {step}: {ours} for {factor}");
            }
        }
    }

    #[test]
    fn names_and_warnings() {
        for schedule in Schedule::ALL {
            assert_eq!(schedule.to_string().parse(), Ok(schedule));
            for (warmup, steps, warned) in [(0, 0, false), (0, 9, false), (8, 9, false), (9, 9, true), (20, 9, true)] {
                assert_eq!(schedule.check(warmup, steps).is_some(), warned, "{schedule} {warmup}/{steps}");
            }
        }
        assert_eq!("step".parse::<Schedule>(), Err(UnknownSchedule("step".into())));
        let text = Schedule::Linear.check(20, 11).map(|w| w.to_string()).unwrap_or_default();
        assert!(text.contains("20 steps") && text.contains("run of 11") && text.contains("50.0%"), "{text}");
    }
}

use serde_json::{Map, Value, json};

use super::{RawConfig, checks::Problem};
use crate::{Error, Result};

/// Where Transformers 5 keeps everything about rotary positions, and where older files keep the scaling alone.
const SECTIONS: [&str; 2] = ["rope_parameters", "rope_scaling"];
const THETA: f64 = 10_000.0;

/// Rotary position embeddings (Su et al. 2021) as a configuration asks for them; see [`crate::rope`] for the angles.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base θ of the angles' geometric series.
    pub rope_theta: f64,
    /// How they are stretched for texts longer than those of the first training.
    pub scaling: RopeScaling,
}

/// `rope_type` with what belongs to it, under the names of the file.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// `default`: no scaling.
    Default,
    /// `linear`: positions are divided by `factor` (Chen et al. 2023).
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// `dynamic`: a base that grows with sequences longer than `max_position_embeddings`. No sequence here is, so that
    /// it equals the default.
    Dynamic {
        /// At least 1.
        factor: f64,
    },
    /// `llama3`: long waves are divided by `factor`, short ones kept, and those between interpolated (Llama 3.1).
    Llama3 {
        /// At least 1.
        factor: f64,
        /// A wave longer than the original length over this is a long one.
        low_freq_factor: f64,
        /// A wave shorter than the original length over this is a short one.
        high_freq_factor: f64,
        /// The length of texts in the first training.
        original_max_position_embeddings: usize,
    },
    /// `yarn`: as `llama3` with a ramp over the number of the wave, and larger scores (Peng et al. 2023, "YaRN").
    Yarn {
        /// At least 1.
        factor: f64,
        /// The length of texts in the first training.
        original_max_position_embeddings: usize,
        /// What cosines and sines are multiplied by.
        attention_factor: f64,
        /// Waves that turn more often than this over the original length are kept.
        beta_fast: f64,
        /// Waves that turn less often than this are divided by `factor`.
        beta_slow: f64,
        /// Whether the ends of the ramp are whole numbers.
        truncate: bool,
    },
}

impl Default for RopeConfig {
    fn default() -> RopeConfig {
        RopeConfig { rope_theta: THETA, scaling: RopeScaling::Default }
    }
}

impl RopeConfig {
    /// Reads `rope_parameters`, or `rope_scaling` with `rope_theta` beside it. `max_positions` stands for an original
    /// length that `yarn` does not give, as in Transformers.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key for what is missing, impossible or said twice in different ways;
    /// [`Error::Unsupported`] for another type.
    pub(super) fn from_raw(raw: &RawConfig, max_positions: usize) -> Result<RopeConfig> {
        let mut read: Option<RopeConfig> = None;
        for name in SECTIONS {
            let Some(section) = Section::of(raw, name)? else { continue };
            let rope = section.rope(max_positions)?;
            if read.as_ref().is_some_and(|other| *other != rope) {
                return Err(raw.error(name, format_args!("contradicts {}; remove one of them", SECTIONS[0])));
            }
            read = Some(rope);
        }
        if let Some(rope) = read {
            return Ok(rope);
        }
        if raw.f64("partial_rotary_factor")?.is_some_and(|part| part != 1.0) {
            return Err(raw.error("partial_rotary_factor", "only whole heads are turned here"));
        }
        Ok(RopeConfig { rope_theta: raw.f64("rope_theta")?.unwrap_or(THETA), scaling: RopeScaling::Default })
    }

    /// The scaling as `rope_scaling` of a file has it.
    pub(super) fn scaling_json(&self) -> Value {
        match self.scaling {
            RopeScaling::Default => Value::Null,
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Dynamic { factor } => json!({"rope_type": "dynamic", "factor": factor}),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original,
            }),
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original,
                attention_factor,
                beta_fast,
                beta_slow,
                truncate,
            } => json!({
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
                "attention_factor": attention_factor,
                "beta_fast": beta_fast,
                "beta_slow": beta_slow,
                "truncate": truncate,
            }),
        }
    }

    /// The first impossible value: its key and what is wrong with it.
    pub(super) fn problem(&self) -> Option<Problem> {
        use RopeScaling::{Default, Dynamic, Linear, Llama3, Yarn};
        if !(self.rope_theta > 1.0 && self.rope_theta.is_finite()) {
            return Some(("rope_theta", format!("{:?} must be a number above 1", self.rope_theta)));
        }
        let factor = match self.scaling {
            Default => 1.0,
            Linear { factor } | Dynamic { factor } | Llama3 { factor, .. } | Yarn { factor, .. } => factor,
        };
        if !(factor >= 1.0 && factor.is_finite()) {
            return Some(("factor", format!("{factor:?} must be at least 1: RoPE is stretched, never squeezed")));
        }
        match self.scaling {
            Llama3 { original_max_position_embeddings: 0, .. } | Yarn { original_max_position_embeddings: 0, .. } => {
                Some(("original_max_position_embeddings", "must be at least 1".into()))
            }
            Llama3 { low_freq_factor: low, high_freq_factor: high, .. } if !(low > 0.0 && low < high) => {
                let problem = format!("{high:?} must be above low_freq_factor = {low:?}, and both above 0");
                Some(("high_freq_factor", problem))
            }
            Yarn { beta_fast: fast, beta_slow: slow, .. } if !(slow > 0.0 && slow <= fast) => {
                Some(("beta_fast", format!("{fast:?} must be at least beta_slow = {slow:?}, and both above 0")))
            }
            Yarn { attention_factor: a, .. } if !(a > 0.0 && a.is_finite()) => {
                Some(("attention_factor", format!("{a:?} must be above 0")))
            }
            _ => None,
        }
    }
}

/// One of the two objects about RoPE, under keys that say where they stand: `rope_scaling.factor`.
struct Section<'a> {
    whole: &'a RawConfig,
    name: &'static str,
    raw: RawConfig,
}

impl<'a> Section<'a> {
    fn of(whole: &'a RawConfig, name: &'static str) -> Result<Option<Section<'a>>> {
        let object = whole.get(name, "an object {...}", Value::as_object)?;
        let Some(object) = object.filter(|o| !o.is_empty()) else { return Ok(None) };
        let keys: Map<String, Value> = object.iter().map(|(k, v)| (format!("{name}.{k}"), v.clone())).collect();
        let raw = RawConfig::new(whole.path(), keys);
        if let Some((key, _)) = raw.keys().iter().find(|(_, v)| v.is_object()) {
            return Err(raw.error(key, "RoPE that differs between layers is not supported"));
        }
        Ok(Some(Section { whole, name, raw }))
    }

    fn rope(&self, max_positions: usize) -> Result<RopeConfig> {
        if let Some(part) = self.either("partial_rotary_factor")?.filter(|part| *part != 1.0) {
            return Err(self.error("partial_rotary_factor", format!("{part:?}: only whole heads are turned here")));
        }
        let rope_theta = self.either("rope_theta")?.unwrap_or(THETA);
        let rope = RopeConfig { rope_theta, scaling: self.scaling(max_positions)? };
        match rope.problem() {
            Some((key, problem)) => Err(self.error(key, problem)),
            None => Ok(rope),
        }
    }

    fn scaling(&self, max_positions: usize) -> Result<RopeScaling> {
        let (new, old) = (self.raw.str(&self.key("rope_type"))?, self.raw.str(&self.key("type"))?);
        if let (Some(new), Some(old)) = (new, old)
            && new != old
        {
            return Err(self.error("rope_type", format!("{new:?} contradicts type = {old:?}; remove one of them")));
        }
        Ok(match new.or(old).unwrap_or("default") {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: self.needed("factor")? },
            "dynamic" => RopeScaling::Dynamic { factor: self.needed("factor")? },
            "llama3" => RopeScaling::Llama3 {
                factor: self.needed("factor")?,
                low_freq_factor: self.needed("low_freq_factor")?,
                high_freq_factor: self.needed("high_freq_factor")?,
                original_max_position_embeddings: self
                    .original()?
                    .ok_or_else(|| self.missing("original_max_position_embeddings"))?,
            },
            "yarn" => self.yarn(max_positions)?,
            other => {
                return Err(Error::Unsupported {
                    path: self.whole.path().to_owned(),
                    what: "the rope_type",
                    found: other.to_owned(),
                    supported: &["default", "linear", "dynamic", "llama3", "yarn"],
                });
            }
        })
    }

    fn yarn(&self, max_positions: usize) -> Result<RopeScaling> {
        let factor = self.needed("factor")?;
        // "YaRN", section 3.4; the second form is DeepSeek's.
        let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
        let number = |key| Ok::<_, Error>(self.raw.f64(&self.key(key))?.filter(|x| *x != 0.0));
        let attention_factor = match (self.raw.f64(&self.key("attention_factor"))?, number("mscale")?) {
            (Some(given), _) => given,
            (None, Some(m)) => number("mscale_all_dim")?.map_or(scale(1.0), |all| scale(m) / scale(all)),
            (None, None) => scale(1.0),
        };
        Ok(RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: self.original()?.unwrap_or(max_positions),
            attention_factor,
            beta_fast: number("beta_fast")?.unwrap_or(32.0),
            beta_slow: number("beta_slow")?.unwrap_or(1.0),
            truncate: self.raw.bool(&self.key("truncate"))?.unwrap_or(true),
        })
    }

    /// The original length, which Phi-3 and its like keep beside the object.
    fn original(&self) -> Result<Option<usize>> {
        let key = "original_max_position_embeddings";
        let (outer, inner) = (self.whole.usize(key)?, self.raw.usize(&self.key(key))?);
        match (outer, inner) {
            (Some(outer), Some(inner)) if outer != inner => {
                Err(self.error(key, format!("{inner} contradicts the {outer} beside it; remove one of them")))
            }
            _ => Ok(outer.or(inner)),
        }
    }

    /// A number that may stand in the object or beside it.
    fn either(&self, key: &str) -> Result<Option<f64>> {
        let (outer, inner) = (self.whole.f64(key)?, self.raw.f64(&self.key(key))?);
        match (outer, inner) {
            (Some(outer), Some(inner)) if outer != inner => {
                Err(self.error(key, format!("{inner:?} contradicts the {outer:?} beside it; remove one of them")))
            }
            _ => Ok(inner.or(outer)),
        }
    }

    fn needed(&self, key: &str) -> Result<f64> {
        self.raw.f64(&self.key(key))?.ok_or_else(|| self.missing(key))
    }

    fn missing(&self, key: &str) -> Error {
        self.error(key, "missing; this rope_type needs it".into())
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.name)
    }

    fn error(&self, key: &str, problem: String) -> Error {
        self.raw.error(&self.key(key), problem)
    }
}

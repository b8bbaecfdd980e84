use std::fmt;

use super::regex::Regex;
use crate::{Error, Result};

/// Which modules are meant, as PEFT's `target_modules` and `exclude_modules` say it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Modules {
    /// Each is a module's name, or the end of it after a dot; none: whatever is the default.
    Names(Vec<String>),
    /// A regular expression that a module's whole name has to match.
    Regex(String),
    /// `all-linear`: every linear map but the output head.
    AllLinear,
}

/// PEFT's word for [`Modules::AllLinear`].
const ALL_LINEAR: &str = "all-linear";

impl Modules {
    /// What a text that stands where a list could stand means in PEFT: a regular expression, or `all-linear`.
    pub fn of_text(text: &str) -> Modules {
        match text.eq_ignore_ascii_case(ALL_LINEAR) {
            true => Modules::AllLinear,
            false => Modules::Regex(text.into()),
        }
    }

    /// What a text on a command line means: `all-linear`, names between commas, or, with a character that no name has, a
    /// regular expression.
    pub fn of_line(text: &str) -> Modules {
        let of_a_name = |c: char| c.is_ascii_alphanumeric() || "_-., ".contains(c);
        match text.eq_ignore_ascii_case(ALL_LINEAR) || !text.chars().all(of_a_name) {
            true => Modules::of_text(text),
            false => text.split(',').map(str::trim).collect(),
        }
    }

    /// No module at all, where [`Modules::default`] is whatever is the default.
    pub fn nothing() -> Modules {
        Modules::Regex("(?!)".into())
    }

    /// Whether nothing was said.
    pub fn is_default(&self) -> bool {
        matches!(self, Modules::Names(names) if names.is_empty())
    }
}

impl Default for Modules {
    fn default() -> Modules {
        Modules::Names(Vec::new())
    }
}

impl<S: Into<String>> FromIterator<S> for Modules {
    fn from_iter<I: IntoIterator<Item = S>>(names: I) -> Modules {
        Modules::Names(names.into_iter().map(Into::into).collect())
    }
}

impl From<Vec<String>> for Modules {
    fn from(names: Vec<String>) -> Modules {
        Modules::Names(names)
    }
}

impl fmt::Display for Modules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Modules::Names(names) => f.write_str(&names.join(",")),
            Modules::Regex(text) => f.write_str(text),
            Modules::AllLinear => f.write_str(ALL_LINEAR),
        }
    }
}

/// PEFT's rule for a name: the module's own, or the end of it after a dot.
pub fn names(name: &str, module: &str) -> bool {
    module.strip_suffix(name).is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

/// PEFT's rule for a module that trains whole: the end of a module's name, with or without a dot before it; what lies in
/// the module trains too.
pub fn saves(module: &str, tensor: &str) -> bool {
    tensor.match_indices('.').any(|(dot, _)| tensor[..dot].ends_with(module))
}

/// Values for some modules, as PEFT's `rank_pattern` and `alpha_pattern` give them.
///
/// A key is a regular expression by the rule `re.match(r"(.*\.)?(KEY)$", module)`, so that a plain name means what it means
/// as a target; of several keys that match, the first holds.
#[derive(Clone, Debug)]
pub struct Pattern<T>(Vec<(Regex, T)>);

impl<T: Copy> Pattern<T> {
    /// With these keys and values; `option` stands in messages.
    ///
    /// # Errors
    /// [`Error::Option`](crate::Error::Option) for what is no regular expression.
    pub fn new(option: &'static str, entries: &[(String, T)]) -> Result<Pattern<T>> {
        let entry = |(key, value): &(String, T)| Ok((Regex::new(option, key, r"\A(.*\.)?(", r")\z")?, *value));
        entries.iter().map(entry).collect::<Result<_>>().map(Pattern)
    }

    /// The value for a module, if a key matches it.
    ///
    /// # Errors
    /// [`Error::Option`](crate::Error::Option) for a regular expression that takes too long.
    pub fn of(&self, module: &str) -> Result<Option<T>> {
        for (regex, value) in &self.0 {
            if regex.is_match(module)? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }

    /// Refuses a key that matches none of the modules that are adapted, and so would change nothing.
    pub(super) fn check_used(&self, option: &'static str, modules: &[&str]) -> Result<()> {
        match self.unused(modules)?.first() {
            None => Ok(()),
            Some(key) => {
                let why = "matches no module that is adapted; leave it out".into();
                Err(Error::Option { option, value: key.to_string(), why })
            }
        }
    }

    /// The keys that match none of these modules.
    pub(super) fn unused(&self, modules: &[&str]) -> Result<Vec<&str>> {
        let mut unused = Vec::new();
        for (regex, _) in &self.0 {
            let mut used = false;
            for module in modules {
                used |= regex.is_match(module)?;
            }
            if !used {
                unused.push(regex.text());
            }
        }
        Ok(unused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_means_what_peft_takes_it_for() {
        let list = |names: &[&str]| names.iter().copied().collect::<Modules>();
        let regex = |text: &str| Modules::Regex(text.into());
        for (text, line, value) in [
            ("all-linear", Modules::AllLinear, Modules::AllLinear),
            ("All-Linear", Modules::AllLinear, Modules::AllLinear),
            ("c_attn", list(&["c_attn"]), regex("c_attn")),
            ("c_attn.q, mlp.c_proj", list(&["c_attn.q", "mlp.c_proj"]), regex("c_attn.q, mlp.c_proj")),
            (r".*\.(q|v)_proj", regex(r".*\.(q|v)_proj"), regex(r".*\.(q|v)_proj")),
        ] {
            assert_eq!(Modules::of_line(text), line, "{text}");
            assert_eq!(Modules::of_text(text), value, "{text}");
            assert_eq!(Modules::of_line(&line.to_string()), line, "{text}");
        }
    }

    /// What `peft.utils.other.get_pattern_key` gives for these keys.
    #[test]
    fn patterns_match_as_pefts_expression_does() {
        const SITES: [&str; 4] =
            ["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj", "transformer.h.1.attn.c_attn", "h.0.xc_attn"];
        for (key, wanted) in [
            ("c_attn", [true, false, true, false]),
            ("attn.c_attn", [true, false, true, false]),
            ("h.0.attn.c_attn", [true, false, false, false]),
            ("transformer.h.0.mlp.c_proj", [false, true, false, false]),
            // The dot is a wildcard.
            ("0.xc.attn", [false, false, false, true]),
            ("_attn", [false; 4]),
            ("a.very.long.name.that.is.longer.than.any.site", [false; 4]),
            (r"h\.0\..*", [true, true, false, true]),
            ("c_attn|c_proj", [true, true, true, false]),
            (r"(?!.*mlp).*_attn", [true, false, true, true]),
        ] {
            let pattern = Pattern::new("rank-pattern", &[(key.to_owned(), 3)]).unwrap();
            let found = SITES.map(|s| pattern.of(s).unwrap() == Some(3));
            assert_eq!(found, wanted, "{key}");
        }
        let two = Pattern::new("rank-pattern", &[("c_attn".into(), 1), ("attn.c_attn".into(), 2)]).unwrap();
        assert_eq!(two.of(SITES[0]).unwrap(), Some(1), "the first that matches");
        assert_eq!(two.unused(&["h.0.xc_attn"]).unwrap(), ["c_attn", "attn.c_attn"]);
    }
}

use std::collections::BTreeSet;

use super::{
    LinearSite, Modules, Options, Outline, Pattern, Site,
    modules::{names, saves},
    regex::Regex,
};
use crate::{Error, Result};

/// Which linear maps a method adapts, by PEFT's rules: `target_modules` and `exclude_modules`, and with names as targets
/// `layers_to_transform` and `layers_pattern`. What trains whole is never adapted.
///
/// Beyond PEFT a name can be that of a part of a fused projection (`c_attn.q`).
#[derive(Clone, Debug)]
pub(super) struct Selection {
    targets: Matcher,
    exclude: Matcher,
    layers: Vec<usize>,
    /// What stands before the number of a layer; none: whatever stands before the first number.
    layers_pattern: Vec<Regex>,
    /// Modules that train whole.
    saved: Vec<String>,
    /// Whether embeddings and the output head can be targets too.
    others: bool,
}

/// Options of a [`Selection`].
pub(super) struct Wanted<'a> {
    pub(super) targets: &'a Modules,
    pub(super) exclude_modules: &'a Modules,
    pub(super) layers_to_transform: &'a [usize],
    pub(super) layers_pattern: &'a [String],
    pub(super) modules_to_save: &'a [String],
    /// Whether embeddings and the output head can be targets too.
    pub(super) others: bool,
}

/// Compiled [`Modules`].
#[derive(Clone, Debug)]
pub(super) enum Matcher {
    Names(Vec<String>),
    Regex(Regex),
    AllLinear,
}

impl Matcher {
    /// # Errors
    /// [`Error::Option`] for an empty name, and for what is no regular expression.
    pub(super) fn new(option: &'static str, modules: &Modules) -> Result<Matcher> {
        Ok(match modules {
            Modules::Names(names) if names.iter().any(|n| n.trim().is_empty()) => {
                let why = "name at least one module, such as c_attn".into();
                return Err(Error::Option { option, value: names.join(","), why });
            }
            Modules::Names(names) => Matcher::Names(names.clone()),
            Modules::Regex(text) => Matcher::Regex(Regex::whole(option, text)?),
            Modules::AllLinear => Matcher::AllLinear,
        })
    }

    /// Whether a module is meant.
    ///
    /// # Errors
    /// [`Error::Option`] for a regular expression that takes too long.
    pub(super) fn matches(&self, module: &str) -> Result<bool> {
        match self {
            Matcher::Names(all) => Ok(all.iter().any(|name| names(name, module))),
            Matcher::Regex(regex) => regex.is_match(module),
            Matcher::AllLinear => Ok(true),
        }
    }
}

impl Matcher {
    /// Refuses exceptions that exclude nothing at all, which PEFT warns of.
    pub(super) fn check_excludes(&self, outline: &Outline) -> Result<()> {
        let value = match self {
            Matcher::Names(all) if !all.is_empty() => all.join(","),
            Matcher::Regex(regex) => regex.text().to_owned(),
            _ => return Ok(()),
        };
        let mut matched = Ok(false);
        outline.any_module(|m| {
            matched = self.matches(m);
            !matches!(matched, Ok(false))
        });
        match matched? {
            true => Ok(()),
            false => {
                let why = "names no module of this model, so it would exclude nothing; leave it out".into();
                Err(Error::Option { option: "exclude-modules", value, why })
            }
        }
    }
}

/// What of a site is adapted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Match {
    Whole,
    /// The part of this number.
    Part(usize),
}

impl Selection {
    /// # Errors
    /// [`Error::Option`] for what makes no sense on any model.
    pub(super) fn new(wanted: &Wanted) -> Result<Selection> {
        let Wanted { targets, exclude_modules, layers_to_transform, layers_pattern, modules_to_save, others } = *wanted;
        let bad = |option, value: String, why: &str| Err(Error::Option { option, value, why: why.into() });
        let shown = |list: &[usize]| list.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        if *exclude_modules == Modules::AllLinear {
            let why = "names modules, or is a regular expression; without any linear map nothing is left to adapt";
            return bad("exclude-modules", exclude_modules.to_string(), why);
        }
        if !layers_to_transform.is_empty() && !matches!(targets, Modules::Names(_)) {
            let why = "goes with targets that are a list of names, as in PEFT; put the layers into the expression";
            return bad("layers-to-transform", shown(layers_to_transform), why);
        }
        if !layers_pattern.is_empty() && layers_to_transform.is_empty() {
            let why = "says where a layer's number stands, so it goes with layers-to-transform";
            return bad("layers-pattern", layers_pattern.join(","), why);
        }
        let pattern = |p: &String| Regex::new("layers-pattern", p, r"\A(?:|.*?\.)", r"\.(?P<idx>\d+)\.");
        Ok(Selection {
            targets: Matcher::new("targets", targets)?,
            exclude: Matcher::new("exclude-modules", exclude_modules)?,
            layers: layers_to_transform.to_vec(),
            layers_pattern: layers_pattern.iter().map(pattern).collect::<Result<_>>()?,
            saved: modules_to_save.to_vec(),
            others,
        })
    }

    /// The same with other targets.
    pub(super) fn with_targets(&self, targets: &Modules) -> Result<Selection> {
        Ok(Selection { targets: Matcher::new("targets", targets)?, ..self.clone() })
    }

    /// The names that are targets on a base that looks like this, unless the targets are said in another way.
    fn names<'a>(&'a self, outline: &'a Outline) -> Option<&'a [String]> {
        match &self.targets {
            Matcher::Names(names) if names.is_empty() => Some(&outline.default_targets),
            Matcher::Names(names) => Some(names),
            _ => None,
        }
    }

    /// Refuses what names nothing that this base has.
    pub(super) fn check(&self, outline: &Outline) -> Result<()> {
        let others = || other_sites(outline).filter(|_| self.others);
        let adaptable = || outline.linear_sites().map(|(site, _)| site).chain(others());
        if let Some(targets) = self.names(outline) {
            for target in targets {
                let mut known = outline.linear_sites().any(|(s, linear)| matching(target, s, linear).is_some())
                    || others().any(|s| names(target, &s.name));
                // What trains whole may be named without being adapted.
                for module in outline.modules_of(|_| true).filter(|m| names(target, m)) {
                    known |= self.is_left_out(module, outline)?;
                }
                if !known {
                    return Err(no_such(target, outline, others()));
                }
            }
        }
        if let Matcher::Regex(regex) = &self.targets {
            let mut matched = false;
            for site in adaptable() {
                matched |= regex.is_match(&site.name)?;
            }
            if !matched {
                return Err(no_such(regex.text(), outline, others()));
            }
            // As PEFT does of every module, those that are made of others included.
            let mut modules = BTreeSet::new();
            outline.any_module(|module| {
                modules.insert(module.to_owned());
                false
            });
            for module in modules.into_iter().filter(|m| !adaptable().any(|s| s.name == *m)) {
                if regex.is_match(&module)? && !self.is_left_out(&module, outline)? {
                    let why = format!(
                        "it matches {module} too, which is no linear map, embedding or output head that could be adapted here"
                    );
                    return Err(Error::Option { option: "targets", value: regex.text().into(), why });
                }
            }
        }
        self.exclude.check_excludes(outline)?;
        if let Some(layer) = self.layers.iter().find(|l| **l >= outline.layers) {
            let why = format!("the model has {} layers, numbered from 0", outline.layers);
            return Err(Error::Option { option: "layers-to-transform", value: layer.to_string(), why });
        }
        if self.adapted(outline)?.is_empty() {
            let value = match &self.targets {
                Matcher::Regex(regex) => regex.text().to_owned(),
                _ => self.names(outline).map_or("all-linear".into(), |names| names.join(",")),
            };
            let why =
                "all that they name is left out: excluded, or in modules that train whole; nothing would be adapted";
            return Err(Error::Option { option: "targets", value, why: why.into() });
        }
        Ok(())
    }

    /// The sites that are adapted.
    pub(super) fn adapted<'a>(&self, outline: &'a Outline) -> Result<Vec<&'a Site>> {
        let mut sites = Vec::new();
        for (site, linear) in outline.linear_sites() {
            if !self.of(site, linear, outline)?.is_empty() {
                sites.push(site);
            }
        }
        for site in other_sites(outline) {
            if self.takes_other(site, outline)? {
                sites.push(site);
            }
        }
        Ok(sites)
    }

    /// What of a linear map is adapted, parts in the order of their columns. Naming the same thing twice (`c_proj` and
    /// `attn.c_proj`) is naming it once, as in PEFT; naming a module and a part of it is a mistake.
    pub(super) fn of(&self, site: &Site, linear: &LinearSite, outline: &Outline) -> Result<Vec<Match>> {
        if self.is_left_out(&site.name, outline)? {
            return Ok(Vec::new());
        }
        let Some(targets) = self.names(outline) else {
            return Ok(if self.targets.matches(&site.name)? { vec![Match::Whole] } else { Vec::new() });
        };
        let mut hits: Vec<(&str, Match)> = Vec::new();
        for target in targets {
            let Some(hit) = matching(target, site, linear) else { continue };
            match hits.iter().find(|(_, other)| *other == hit || *other == Match::Whole || hit == Match::Whole) {
                None => hits.push((target, hit)),
                Some((_, other)) if *other == hit => {}
                Some((first, _)) => {
                    let (first, second) = (first.to_string(), target.clone());
                    return Err(Error::OverlappingTargets { first, second, module: site.name.clone() });
                }
            }
        }
        let mut hits: Vec<Match> = hits.into_iter().map(|(_, hit)| hit).collect();
        hits.sort_by_key(|m| match m {
            Match::Whole => 0,
            Match::Part(i) => *i,
        });
        Ok(hits)
    }

    /// The modules that are adapted, for a method that adapts whole ones: a part of one is refused.
    pub(super) fn whole_modules<'a>(&self, outline: &'a Outline) -> Result<Vec<&'a str>> {
        let mut modules = Vec::new();
        for (site, linear) in outline.linear_sites() {
            let hits = self.of(site, linear, outline)?;
            if hits.iter().any(|hit| *hit != Match::Whole) {
                let why = format!("{} is adapted as a whole; name it without its part", site.name);
                let value = self.names(outline).unwrap_or_default().join(",");
                return Err(Error::Option { option: "targets", value, why });
            }
            modules.extend((!hits.is_empty()).then_some(site.name.as_str()));
        }
        Ok(modules)
    }

    /// Whether an embedding, or the output head, is adapted; `all-linear` means neither.
    pub(super) fn takes_other(&self, site: &Site, outline: &Outline) -> Result<bool> {
        if !self.others || matches!(self.targets, Matcher::AllLinear) || self.is_left_out(&site.name, outline)? {
            return Ok(false);
        }
        match self.names(outline) {
            Some(targets) => Ok(targets.iter().any(|target| names(target, &site.name))),
            None => self.targets.matches(&site.name),
        }
    }

    /// Whether a module stays as it is although a target may name it.
    fn is_left_out(&self, module: &str, outline: &Outline) -> Result<bool> {
        if self.exclude.matches(module)? || self.saved.iter().chain(&outline.modules_to_save).any(|m| is_in(module, m))
        {
            return Ok(true);
        }
        // As in PEFT, a module that a target names from its beginning is adapted in any layer.
        let whole = |target: &String| {
            let rest = target.strip_prefix(module);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        if self.layers.is_empty() || matches!(&self.targets, Matcher::Names(targets) if targets.iter().any(whole)) {
            return Ok(false);
        }
        Ok(self.layer(module)?.is_none_or(|layer| !self.layers.contains(&layer)))
    }

    /// The number of the layer that a module's name says.
    fn layer(&self, module: &str) -> Result<Option<usize>> {
        let number = |s: &str| s.parse().ok();
        if self.layers_pattern.is_empty() {
            // PEFT's `.*?\.[^.]*\.(\d+)\.`: the first number with two names before it and one after.
            let segments: Vec<&str> = module.split('.').collect();
            let inner = segments.get(2..segments.len().saturating_sub(1)).unwrap_or_default();
            return Ok(inner
                .iter()
                .find(|s| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit()))
                .and_then(|s| number(s)));
        }
        for pattern in &self.layers_pattern {
            if let Some(found) = pattern.group("idx", module)? {
                return Ok(number(found));
            }
        }
        Ok(None)
    }
}

impl Options {
    /// The same without the targets, exceptions and patterns that match nothing on a base that looks like this, and those, by
    /// their options: of an adapter that was trained elsewhere, where they are passed over, as in PEFT. Where no target
    /// matches, all of them stay.
    ///
    /// # Errors
    /// [`Error::Option`] for what makes no sense on any model.
    pub fn fitting(&self, outline: &Outline) -> Result<(Options, Vec<(&'static str, String)>)> {
        let (mut fitting, mut left) = (self.clone(), Vec::new());
        let is_there = |name: &str| {
            let part = |site: &Site, linear: &LinearSite| matching(name, site, linear).is_some();
            outline.any_module(|module| names(name, module)) || outline.linear_sites().any(|(s, l)| part(s, l))
        };
        if let Modules::Names(targets) = &mut fitting.targets
            && targets.iter().any(|name| is_there(name))
        {
            let absent: Vec<String> = targets.extract_if(.., |name| !is_there(name)).collect();
            // Of (IA)³ some of them are feed-forward modules too, by the same names.
            if let Modules::Names(names) = &mut fitting.feedforward_modules {
                names.retain(|name| !absent.contains(name));
                if names.is_empty() && !self.feedforward_modules.is_default() {
                    fitting.feedforward_modules = Modules::nothing();
                }
            }
            left.extend(absent.into_iter().map(|name| ("targets", name)));
        }
        if fitting.layers_to_transform.iter().any(|layer| *layer < outline.layers) {
            let absent = fitting.layers_to_transform.extract_if(.., |layer| *layer >= outline.layers);
            left.extend(absent.map(|layer| ("layers-to-transform", layer.to_string())));
        }
        // A head without a matrix of its own is there, and PEFT trains a copy of it: that is refused, not passed over.
        let saved = |name: &str| {
            outline.tied_embedding().is_some() && saves(name, "lm_head.weight")
                || outline.tensors.iter().any(|t| saves(name, &t.name))
        };
        let absent = fitting.modules_to_save.extract_if(.., |name| !saved(name));
        left.extend(absent.map(|name| ("modules-to-save", name)));
        match &mut fitting.exclude_modules {
            Modules::Names(excluded) => {
                left.extend(excluded.extract_if(.., |name| !is_there(name)).map(|name| ("exclude-modules", name)));
            }
            excluded => {
                if Matcher::new("exclude-modules", excluded)?.check_excludes(outline).is_err() {
                    left.push(("exclude-modules", excluded.to_string()));
                    *excluded = Modules::default();
                }
            }
        }
        if !fitting.rank_pattern.is_empty() || !fitting.alpha_pattern.is_empty() {
            let selection = Selection::new(&Wanted {
                targets: &fitting.targets,
                exclude_modules: &fitting.exclude_modules,
                layers_to_transform: &fitting.layers_to_transform,
                layers_pattern: &fitting.layers_pattern,
                modules_to_save: &fitting.modules_to_save,
                others: true,
            })?;
            let adapted: Vec<&str> = selection.adapted(outline)?.into_iter().map(|site| site.name.as_str()).collect();
            left.extend(unused("rank-pattern", &mut fitting.rank_pattern, &adapted)?);
            left.extend(unused("alpha-pattern", &mut fitting.alpha_pattern, &adapted)?);
        }
        Ok((fitting, left))
    }
}

/// Takes out the keys that match none of these modules.
fn unused<T: Copy>(
    option: &'static str,
    pattern: &mut Vec<(String, T)>,
    modules: &[&str],
) -> Result<Vec<(&'static str, String)>> {
    let compiled = Pattern::new(option, pattern)?;
    let keys: BTreeSet<String> = compiled.unused(modules)?.into_iter().map(str::to_owned).collect();
    pattern.retain(|(key, _)| !keys.contains(key));
    Ok(keys.into_iter().map(|key| (option, key)).collect())
}

/// Embeddings and the output head.
pub(super) fn other_sites(outline: &Outline) -> impl Iterator<Item = &Site> {
    outline.embedding_sites().map(|(site, _)| site).chain(outline.head_site().map(|(site, _)| site))
}

/// Whether a module is this one, whose name may be the end of a path, or lies in it.
pub(super) fn is_in(module: &str, whole: &str) -> bool {
    let (parts, wanted): (Vec<&str>, Vec<&str>) = (module.split('.').collect(), whole.split('.').collect());
    parts.windows(wanted.len()).any(|w| w == wanted)
}

/// What of a site a target names.
fn matching(target: &str, site: &Site, linear: &LinearSite) -> Option<Match> {
    if names(target, &site.name) {
        return Some(Match::Whole);
    }
    let (module, part) = target.rsplit_once('.')?;
    let i = linear.parts.iter().position(|(name, _)| *name == part)?;
    names(module, &site.name).then_some(Match::Part(i))
}

/// The answer to a target that names nothing: all that one could name.
fn no_such<'a>(target: &str, outline: &Outline, others: impl Iterator<Item = &'a Site>) -> Error {
    let last = |site: &'a Site| site.name.rsplit('.').next().unwrap_or_default().to_owned();
    let mut modules: Vec<String> = others.map(last).collect();
    for (site, linear) in outline.linear_sites() {
        // `transformer.h.3.attn.c_attn` is shown as `attn.c_attn`: what follows the layer's number.
        let parts: Vec<&str> = site.name.split('.').collect();
        let from = parts.iter().rposition(|p| p.parse::<usize>().is_ok()).map_or(0, |i| i + 1);
        let name = parts[from..].join(".");
        let fused = linear.parts.iter().map(|(p, _)| format!("{name}.{p}"));
        modules.extend([name.clone()].into_iter().chain(fused));
    }
    modules.sort();
    modules.dedup();
    Error::NoSuchTarget { target: target.into(), modules }
}

use std::collections::BTreeMap;

use super::{
    Adapter, Attached, Method, Outline, Plan, Site, SiteKind, Start, TokensAdapter, VirtualTokens, load_plain,
    save_plain,
};
use crate::{Error, Init, ParamId, Params, Result, Tape, Tensor, Var};

/// Prefix-embedding tuning (PreEmbed of the LoRA paper, section 5.1; prompt tuning of Lester et al. 2021): l_p virtual
/// tokens before the text and l_i after the prompt, of which the embeddings train, d·(l_p + l_i) scalars. They have
/// positions like all tokens, and every layer computes them. A classifier looks at the text's own first token or, as in
/// PEFT, at the first virtual one ([`VirtualTokens::classify`]).
///
/// Each begins as a copy of the embedding of a random token of the vocabulary (Lester et al. 2021, section 3.1).
#[derive(Clone, Copy, Debug)]
pub struct PreEmbed {
    tokens: VirtualTokens,
}

/// Refuses no virtual tokens, and absurdly many.
pub(super) fn checked(tokens: VirtualTokens) -> Result<VirtualTokens> {
    const MOST: usize = 1 << 20;
    let VirtualTokens { prefix, infix, .. } = tokens;
    let bad =
        |option, value: usize, why: &str| Err(Error::Option { option, value: value.to_string(), why: why.into() });
    match () {
        () if prefix > MOST => bad("prefix", prefix, "more virtual tokens than any model has positions"),
        () if infix > MOST => bad("infix", infix, "more virtual tokens than any model has positions"),
        () if prefix + infix == 0 => bad("prefix", 0, "give at least one virtual token, as prefix or as infix"),
        () => Ok(tokens),
    }
}

/// Refuses virtual tokens that leave no positions for others.
pub(super) fn check_positions(tokens: VirtualTokens, outline: &Outline) -> Result<()> {
    if tokens.positions() < outline.max_positions {
        return Ok(());
    }
    let VirtualTokens { prefix, infix, .. } = tokens;
    let option = if prefix >= infix { "prefix" } else { "infix" };
    Err(Error::Option {
        option,
        value: prefix.max(infix).to_string(),
        why: format!(
            "{prefix} + {infix} virtual tokens leave none of the model's {} positions for the text",
            outline.max_positions
        ),
    })
}

impl PreEmbed {
    /// With so many virtual tokens.
    ///
    /// # Errors
    /// [`Error::Option`] for none at all.
    pub fn new(tokens: VirtualTokens) -> Result<PreEmbed> {
        Ok(PreEmbed { tokens: checked(tokens)? })
    }
}

impl Method for PreEmbed {
    fn name(&self) -> &'static str {
        "pre-embed"
    }

    fn check(&self, outline: &Outline) -> Result<()> {
        outline.needs(self.name(), "place for virtual tokens", |k| matches!(k, SiteKind::Tokens { .. }))?;
        let refuse = |why: &str| {
            Err(Error::Option { option: "classify-prefix", value: "true".into(), why: format!("{why}; leave it out") })
        };
        match self.tokens {
            VirtualTokens { classify: true, prefix: 0, .. } => return refuse("there is no prefix to classify by"),
            VirtualTokens { classify: true, .. } if outline.task_type != Some("SEQ_CLS") => {
                return refuse("this model classifies no texts");
            }
            _ => {}
        }
        check_positions(self.tokens, outline)
    }

    fn attach(&self, site: &Site, plan: &mut Plan) -> Result<Option<Attached>> {
        let SiteKind::Tokens { table, width } = &site.kind else { return Ok(None) };
        let init = plan.base_tensor(table).map_or(Init::Zeros, |t| Init::SampledRows(t.clone()));
        let name = format!("{}.prompt_embeddings", site.name);
        let embeddings = plan.add(name, &[self.tokens.count(), *width], init);
        Ok(Some(Attached::Tokens(Box::new(Prompt { site: site.name.clone(), tokens: self.tokens, embeddings }))))
    }

    fn start(&self) -> Start {
        Start::Elsewhere
    }
}

#[derive(Debug)]
struct Prompt {
    site: String,
    tokens: VirtualTokens,
    embeddings: ParamId,
}

impl TokensAdapter for Prompt {
    fn virtual_tokens(&self) -> VirtualTokens {
        self.tokens
    }

    fn embeddings(&self, t: &mut Tape) -> Result<Var> {
        t.param(self.embeddings)
    }
}

impl Adapter for Prompt {
    fn save(&self, params: &Params) -> Result<Vec<(String, Tensor)>> {
        Ok(save_plain(params, &self.site, &[self.embeddings]))
    }

    fn load(&self, params: &mut Params, _site: &str, tensors: &mut BTreeMap<String, Tensor>) -> Result<()> {
        load_plain(params, &[self.embeddings], tensors)
    }
}

use super::{BaseTensor, Layers, Method, Outline};
use crate::{Error, Result};

/// Fine-tuning of some layers alone, by default the last two: FT_Top2 of the LoRA paper, section 5.1 (after Li and Liang
/// 2021). Embeddings, the last normalisation and a language model's head stay frozen; a classifier's head trains.
///
/// On GPT-2 Medium these are 25,192,448 scalars.
#[derive(Clone, Debug)]
pub struct Top {
    layers: Layers,
}

impl Top {
    /// Of these layers.
    pub fn new(layers: Layers) -> Result<Top> {
        match layers == Layers::NONE || layers == Layers::Last(0) {
            false => Ok(Top { layers }),
            true => Err(Error::Option {
                option: "layers",
                value: layers.to_string(),
                why: "name at least one layer to train, such as last:2".into(),
            }),
        }
    }
}

impl Method for Top {
    fn name(&self) -> &'static str {
        "top2"
    }

    fn check(&self, outline: &Outline) -> Result<()> {
        self.layers.of("layers", outline.layers).map(drop)
    }

    fn trains(&self, tensor: &BaseTensor, outline: &Outline) -> bool {
        let layers = self.layers.of("layers", outline.layers).unwrap_or_default();
        tensor.layer.is_some_and(|layer| layers.contains(&layer))
    }
}

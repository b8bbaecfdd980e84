//! Values of a configuration that stand in TOML and JSON in more than one way.

use serde::{Deserialize, Deserializer};

/// A list, or what would be the only one in it.
pub(super) fn one_or_more<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    from: D,
) -> std::result::Result<Vec<T>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a value or a list of such")]
    enum Read<T> {
        One(T),
        More(Vec<T>),
    }
    Ok(match Read::deserialize(from)? {
        Read::One(one) => vec![one],
        Read::More(list) => list,
    })
}

/// Keys and values in TOML and JSON, in their order.
pub(super) mod pattern {
    use std::{fmt, marker::PhantomData};

    use serde::{
        Deserialize, Deserializer, Serialize, Serializer,
        de::{MapAccess, Visitor},
    };

    struct Entries<T>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
        type Value = Vec<(String, T)>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("names of modules and numbers")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut entries = Vec::new();
            while let Some(entry) = map.next_entry()? {
                entries.push(entry);
            }
            Ok(entries)
        }
    }

    pub(in super::super) fn serialize<T: Serialize, S: Serializer>(
        entries: &[(String, T)],
        to: S,
    ) -> Result<S::Ok, S::Error> {
        to.collect_map(entries.iter().map(|(key, value)| (key, value)))
    }

    pub(in super::super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Vec<(String, T)>, D::Error> {
        from.deserialize_map(Entries(PhantomData))
    }
}

/// [`Modules`] in TOML and JSON: a list of names, or a text.
pub(super) mod modules {
    use lora_core::peft::Modules;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a list of names, a regular expression, or \"all-linear\"")]
    enum Read {
        Names(Vec<String>),
        Text(String),
    }

    pub(in super::super) fn serialize<S: Serializer>(modules: &Modules, to: S) -> Result<S::Ok, S::Error> {
        match modules {
            Modules::Names(names) => names.serialize(to),
            other => other.to_string().serialize(to),
        }
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Modules, D::Error> {
        Ok(match Read::deserialize(from)? {
            Read::Names(names) => Modules::Names(names),
            Read::Text(text) => Modules::of_text(&text),
        })
    }
}

/// [`InitLoraWeights`] in TOML and JSON: a truth value, or a word.
pub(super) mod init_lora_weights {
    use lora_core::peft::InitLoraWeights;
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected true, false, or a word for how A and B begin, such as \"pissa\"")]
    enum Read {
        Zero(bool),
        Word(String),
    }

    pub(in super::super) fn serialize<S: Serializer>(init: &InitLoraWeights, to: S) -> Result<S::Ok, S::Error> {
        match init {
            InitLoraWeights::Kaiming => true.serialize(to),
            InitLoraWeights::Random => false.serialize(to),
            other => other.word().serialize(to),
        }
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<InitLoraWeights, D::Error> {
        let word = match Read::deserialize(from)? {
            Read::Zero(zero) => zero.to_string(),
            Read::Word(word) => word,
        };
        InitLoraWeights::parse(&word).map_err(D::Error::custom)
    }
}

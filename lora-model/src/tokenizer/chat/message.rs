//! What a conversation is made of.

use serde_json::{Map, Value};

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or another name that the model's template knows.
    pub role: String,
    /// What is said; `None` where a message is a call of tools alone.
    pub content: Option<String>,
    /// What else templates may read, by its key: `name`, `tool_calls`, `reasoning_content`.
    pub more: Map<String, Value>,
}

/// Names of a message's thoughts; the first is the one that templates read.
const THOUGHTS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

impl Message {
    /// A message of a role and what it says.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: Some(content.into()), more: Map::new() }
    }

    /// Whether the assistant says it.
    pub fn is_assistant(&self) -> bool {
        self.role == "assistant"
    }

    /// What a template sees: as in Transformers keys without a value are absent, and thoughts stand under the names that
    /// templates read, whatever name they came under.
    pub(super) fn for_template(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("role".to_owned(), self.role.clone().into());
        map.extend(self.content.clone().map(|text| ("content".to_owned(), text.into())));
        map.extend(self.more.clone().into_iter().filter(|(_, value)| !value.is_null()));
        if let Some(thoughts) = THOUGHTS.iter().find_map(|key| map.get(*key)).cloned() {
            map.entry("thinking").or_insert_with(|| thoughts.clone());
            map.insert(THOUGHTS[0].to_owned(), thoughts);
        }
        map
    }
}

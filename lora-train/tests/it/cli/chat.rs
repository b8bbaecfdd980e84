//! Conversations: learned turn by turn, answered by the model's own template.

use lora_model::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::cli::lab::{Lab, success};

const TEMPLATE: &str = "\
{%- for message in messages %}
    {%- if message.role == 'tool' %}{{ raise_exception('tools have no say') }}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content.strip() + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
";

const FOODS: [(&str, &str); 3] = [("Blue Fig", "tea"), ("Old Mill", "fish"), ("Sun Cat", "soup")];

/// A line of a conversation of two questions, or of the first without an answer.
fn line(name: &str, food: &str, answered: bool) -> String {
    let said = |role: &str, content: String| json!({"role": role, "content": content});
    let first = said("user", format!("name : {name}"));
    let messages = match answered {
        true => vec![
            first,
            said("assistant", format!("{name} serves {food} .")),
            said("user", "near".into()),
            said("assistant", "near the river .".into()),
        ],
        false => vec![first],
    };
    json!({"messages": messages}).to_string() + "\n"
}

/// A folder `base` whose tokenizer has the tokens of the template, and `chats.jsonl`.
fn lab() -> Lab {
    let lab = Lab::new();
    let mut next = 0;
    lab.model("base", |config| {
        next = config.vocab_size;
        config.vocab_size += 2;
        config.n_positions = 128;
    });
    let mut file: Value = serde_json::from_str(&lab.read("base/tokenizer.json")).unwrap();
    let added = file["added_tokens"].as_array_mut().unwrap();
    for (i, content) in ["<|im_start|>", "<|im_end|>"].iter().enumerate() {
        let mut token = added[0].clone();
        token["id"] = json!(next + i);
        token["content"] = json!(content);
        added.push(token);
    }
    lab.write("base/tokenizer.json", &file.to_string());
    lab.write("base/chat_template.jinja", TEMPLATE);
    lab.write("chats.jsonl", &FOODS.map(|(name, food)| line(name, food, true)).concat());
    lab
}

#[test]
fn a_model_learns_to_answer_and_to_stop() {
    let lab = lab();
    let tokenizer = Tokenizer::from_dir(&lab.path("base")).unwrap();
    let count = |text: &str| tokenizer.encode(text).unwrap().len() + 1;
    let targets: usize =
        FOODS.iter().map(|(name, food)| count(&format!("{name} serves {food} .")) + count("near the river .")).sum();
    let eval = |args: &str| lab.json(&format!("eval {args} --data chats.jsonl --json"));
    let before = eval("--model base");
    assert_eq!(before["targets"], json!(targets));

    lab.ok("train --model base --data chats.jsonl --out adapter --steps 40 --lr 3e-2 --batch-size 3");
    lab.ok("train --model base --data chats.jsonl --out full --method full --steps 150 --lr 1e-2 --batch-size 3");
    let (adapter, full) = (eval("--model base --adapter adapter"), eval("--model full"));
    let loss = |v: &Value| v["loss"].as_f64().unwrap();
    assert!(loss(&adapter) < loss(&before) - 0.05 && loss(&full) < 0.1, "{before} {adapter} {full}");

    // The model that training wrote has the template with it.
    let generate = "generate --model full --max-new-tokens 40";
    let end = tokenizer.token_id("<|im_end|>").unwrap();
    for (name, food) in FOODS {
        let output = lab.lora_with(&format!("{generate} --chat --json --prompt"), &format!("name : {name}"));
        let answer: Value = serde_json::from_str(&success(generate, output)).unwrap();
        assert_eq!(answer["text"], json!(format!("{name} serves {food} .")));
        let prompt = format!("<|im_start|>user\nname : {name}<|im_end|>\n<|im_start|>assistant\n");
        assert_eq!((&answer["prompt"], &answer["finished"]), (&json!(prompt), &json!(true)));
        assert_eq!(answer["tokens"].as_array().unwrap().last(), Some(&json!(end)));
        let output = lab.lora_with(&format!("{generate} --chat --system serves --json --prompt"), "near");
        let prompt: Value = serde_json::from_str(&success(generate, output)).unwrap();
        let text = "<|im_start|>system\nserves<|im_end|>\n<|im_start|>user\nnear<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(prompt["prompt"], json!(text));
    }

    // A file's last answers are not given away; those before them are part of the conversation.
    let asked: String = FOODS.iter().map(|(name, food)| line(name, food, *food != "fish")).collect();
    lab.write("asked.jsonl", &format!("{asked}{{\"text\": \"name\"}}\n"));
    let said = lab.ok(&format!("{generate} --data asked.jsonl"));
    let said: Vec<&str> = said.lines().collect();
    assert_eq!(said[..3], ["near the river .", "Old Mill serves fish .", "near the river ."]);
    // Who names other ends gets those alone.
    let on = lab.ok(&format!("{generate} --data asked.jsonl --eos none --json"));
    let first: Value = serde_json::from_str(on.lines().next().unwrap()).unwrap();
    assert_eq!((&first["finished"], first["tokens"].as_array().unwrap().len()), (&json!(false), 40));
}

/// In training an infix stands before the first answer, and when a text is made before the one that is to come.
#[test]
fn an_infix_wants_conversations_of_one_answer() {
    let lab = lab();
    let train = "train --model base --method pre-layer --steps 1 --batch-size 3 --prefix 1 --infix 2";
    lab.fails(&format!("{train} --data chats.jsonl --out two"), &["infix = 2", "speaks twice"]);
    let said = |role: &str, content: &str| json!({"role": role, "content": content});
    let one = json!({"messages": [said("user", "near"), said("assistant", "near the river .")]});
    lab.write("one.jsonl", &format!("{one}\n{one}\n{one}\n"));
    lab.ok(&format!("{train} --data one.jsonl --out one"));
    lab.ok(&format!("{} --data chats.jsonl --out prefix", train.replace("--infix 2", "--infix 0")));
}

#[test]
fn a_run_knows_when_its_turns_have_changed() {
    let lab = lab();
    lab.write("first.toml", "model = \"base\"\ndata = \"chats.jsonl\"\nout = \"run\"\nsteps = 4\nsave-every = 2\n");
    lab.ok("train --config first.toml");
    // The same tokens, of which others are the assistant's.
    let marked = TEMPLATE
        .replace("+ message.content.strip() +", "}}{% generation %}{{ message.content.strip() }}{% endgeneration %}{{");
    lab.write("base/chat_template.jinja", &marked);
    lab.fails("train --config first.toml --resume --out run", &["data has changed"]);
    lab.write("base/chat_template.jinja", TEMPLATE);
    lab.ok("train --config first.toml --resume --out run");
}

#[test]
fn what_cannot_be_a_conversation() {
    let lab = lab();
    lab.model("plain", |_| ());
    lab.write("asks.jsonl", &(line("Blue Fig", "tea", true) + &line("Old Mill", "fish", false)));
    lab.write("tools.jsonl", &line("Sun Cat", "soup", true).replacen("user", "tool", 1));
    let no_template = ["no chat template", "chat_template.jinja", "tokenizer_config.json"];
    let cases: [(&str, &str, &[&str]); 3] = [
        ("base", "asks.jsonl", &["asks.jsonl:2", "no message has the role \"assistant\""]),
        ("base", "tools.jsonl", &["tools.jsonl:1", "chat template, line 2", "tools have no say"]),
        ("plain", "chats.jsonl", &["chats.jsonl:1", no_template[0], no_template[1], no_template[2]]),
    ];
    for (model, data, parts) in cases {
        lab.fails(&format!("train --model {model} --data {data} --out out --steps 1"), parts);
        lab.fails(&format!("eval --model {model} --data {data}"), parts);
        assert!(!lab.path("out").exists());
    }
    lab.fails(
        "generate --model base --data tools.jsonl",
        &["tools.jsonl:1", "chat template, line 2", "tools have no say"],
    );
    lab.fails("generate --model plain --chat --prompt a", &["--prompt: ", "plain", no_template[0]]);
    lab.fails("generate --model base --chat --data chats.jsonl", &["--chat", "--prompt"]);
    lab.fails("generate --model base --prompt a --system b", &["--chat"]);
    lab.fails("pretrain --text chats.jsonl --out new --steps 1", &["chats.jsonl:1", "no chat template", "\"text\""]);
    lab.fails(
        "train --model base --data chats.jsonl --out out --max-length 9",
        &["none of the 3 examples", "--max-length"],
    );
    lab.write("base/chat_template.jinja", "{% for m in messages %}\n{{ m.content }");
    lab.fails("train --model base --data chats.jsonl --out out", &["chats.jsonl:1", "chat_template.jinja", "line 2"]);
}

//! Encoders on labelled data: what is read, what is refused, and that training does what it says.

use std::{
    fs,
    path::{Path, PathBuf},
};

use lora_core::peft::Adapted;
use lora_kernels::{DType, Device};
use lora_model::{config::RawConfig, load, tokenizer::Joined};
use lora_train::{
    Error, Evaluation, Step, TextJoiner, TrainConfig, Trainer,
    data::{self, Answer, Content, Format, Goal, Labels, TASKS, TaskKind, encode_task, read_task, task},
    evaluate,
    metrics::Metric,
    task::{FILE, Fitted, load_with_adapter, of_adapter},
    train,
};
use serde_json::Value;

fn with_file<T>(bytes: &[u8], f: impl FnOnce(&Path) -> T) -> T {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data");
    fs::write(&path, bytes).unwrap();
    f(&path)
}

/// Line, text, second text and answer of an example.
type Row = (usize, String, Option<String>, String);

fn read(name: &str, format: Format, file: &str) -> data::Result<Vec<Row>> {
    let corpus = with_file(file.as_bytes(), |path| read_task(path, task(name).unwrap(), format))?;
    let parts = |e: data::Example| {
        let Content::Labelled { text, second, answer } = e.content else { panic!("{e:?}") };
        let answer = match answer {
            Answer::Label(name) => name,
            Answer::Value(value) => value.to_string(),
        };
        (e.line, text, second, answer)
    };
    Ok(corpus.examples.into_iter().map(parts).collect())
}

#[test]
fn files_of_tasks() {
    // Each gives text, second text ("" for none) and answer, with its line.
    type Rows = &'static [(usize, &'static str, &'static str, &'static str)];
    let table: &[(&str, &str, Rows)] = &[
        ("sst2", "sentence\tlabel\nit 's \"fun\t1\n", &[(2, "it 's \"fun", "", "1")]),
        ("sst2", "dull \t0\n\nfine\t1", &[(1, "dull", "", "0"), (3, "fine", "", "1")]),
        (
            "mrpc",
            "\u{feff}Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t12\t13\t\"A said .\tB\" said .\r\n",
            &[(2, "\"A said .", "B\" said .", "1")],
        ),
        (
            "cola",
            "gj04\t0\t*\tThey drank pub .\ngj04\t1\t\tHe came .",
            &[(1, "They drank pub .", "", "0"), (2, "He came .", "", "1")],
        ),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n", &[(2, "a", "b", "not_entailment")]),
        (
            "stsb",
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n\
             0\tm\tf\t2012\t1\tn\tn\tA plane .\tAn air plane .\t5.000\n",
            &[(2, "A plane .", "An air plane .", "5")],
        ),
        (
            "mnli",
            "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label\n0\t1\tx\ty\tneutral\tcontradiction\n",
            &[(2, "x", "y", "contradiction")],
        ),
        ("mnli-mm", "sentence1\tsentence2\tgold_label\nx\ty\tneutral\n", &[(2, "x", "y", "neutral")]),
        // As Hugging Face names the columns.
        ("mnli", "premise\thypothesis\tlabel\nx\ty\tneutral\n", &[(2, "x", "y", "neutral")]),
        ("qnli", "index\tquestion\tsentence\tlabel\n0\twho?\tme\tentailment\n", &[(2, "who?", "me", "entailment")]),
        (
            "qqp",
            // The publishers' readers pass over the rows that are cut short, of which there are some.
            "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t1\t2\ta?\tb?\t0\n2\t3\t4\tcut\n3\t5\t6\tc?\td?\t1\n",
            &[(2, "a?", "b?", "0"), (4, "c?", "d?", "1")],
        ),
        ("labels", "a b\tred\nc\tblue\n", &[(1, "a b", "", "red"), (2, "c", "", "blue")]),
        ("labels", "label\ttext\nred\ta\n", &[(2, "a", "", "red")]),
        ("labels", "a\tb\tred\n", &[(1, "a", "b", "red")]),
        ("values", "a\t-1.5e0\n", &[(1, "a", "", "-1.5")]),
    ];
    for (name, file, rows) in table {
        let rows: Vec<_> = rows
            .iter()
            .map(|&(line, text, second, answer)| {
                (line, text.to_owned(), (!second.is_empty()).then(|| second.to_owned()), answer.to_owned())
            })
            .collect();
        assert_eq!(read(name, Format::Tsv, file).unwrap(), rows, "{name}: {file:?}");
    }
    let json: &[(&str, &str, Rows)] = &[
        (
            "sst2",
            "{\"sentence\": \"a\", \"label\": 1}\n{\"sentence\": \"b\", \"label\": \"0\"}",
            &[(1, "a", "", "1"), (2, "b", "", "0")],
        ),
        // Numbers of the labels, as data sets have them.
        (
            "mnli",
            "{\"sentence1\": \"a\", \"sentence2\": \"b\", \"label\": 2, \"idx\": 0}",
            &[(1, "a", "b", "contradiction")],
        ),
        (
            "labels",
            "{\"text\": \"a\", \"label\": \"x\"}\n{\"sentence\": \"b\", \"sentence2\": null, \"label\": 7}",
            &[(1, "a", "", "x"), (2, "b", "", "7")],
        ),
        ("labels", "{\"text\": \"a\", \"text2\": \"b\", \"label\": true}", &[(1, "a", "b", "1")]),
        (
            "labels",
            "{\"text\": \"a\", \"label\": 1.0}\n{\"text\": \"b\", \"label\": 1.5}",
            &[(1, "a", "", "1"), (2, "b", "", "1.5")],
        ),
        (
            "values",
            "{\"text\": \"a\", \"value\": 2}\n{\"text\": \"a\", \"score\": \"0.25\"}",
            &[(1, "a", "", "2"), (2, "a", "", "0.25")],
        ),
    ];
    for (name, file, rows) in json {
        let read = read(name, Format::Jsonl, file).unwrap();
        let read: Vec<_> =
            read.iter().map(|(l, t, s, a)| (*l, t.as_str(), s.as_deref().unwrap_or_default(), a.as_str())).collect();
        assert_eq!(read, *rows, "{name}: {file:?}");
    }
}

#[test]
fn files_of_tasks_that_are_refused() {
    use Format::{E2e, Jsonl, Tsv};
    let table: &[(&str, Format, &str, &[&str])] = &[
        ("sst2", Tsv, "", &["is empty"]),
        ("sst2", Tsv, "\u{feff}\n \n", &["blank lines"]),
        ("sst2", Tsv, "sentence\tlabel\n", &["headings, but no examples"]),
        ("sst2", E2e, "a||b", &["--format e2e has no labels", "--task sst2"]),
        ("sst2", Tsv, "sentence\tlabel\na\t1\nb\t1\tc\n", &["data:3:", "3 columns", "in place of 2", "\"b\t1\tc\""]),
        ("rte", Tsv, "sentence1\tsentence2\tlabel\na\tb\n", &["data:2:", "2 columns", "in place of 3"]),
        // Too many is never what the publishers mean.
        ("qqp", Tsv, "question1\tquestion2\tis_duplicate\na\tb\t1\tc\n", &["data:2:", "4 columns"]),
        (
            "mrpc",
            Tsv,
            "Quality\t#1 String\tother\n1\ta\tb\n",
            &["data:1:", "no column #2 String or sentence2", "\"other\""],
        ),
        ("rte", Tsv, "index\tsentence1\tsentence2\n0\ta\tb\n", &["no column label", "for testing have no labels"]),
        ("sst2", Tsv, "index\tsentence\n0\tfine\n", &["data:1:", "no column label", "for testing have no labels"]),
        ("labels", Tsv, "text\tclass\nfine\tred\n", &["data:1:", "no column label", "\"class\""]),
        ("cola", Tsv, "a\tb\n", &["no column sentence", "has 4 columns"]),
        ("sst2", Tsv, "a\t1\nb\t2\n", &["data:2:2:", "label \"2\"", "\"0\", \"1\""]),
        ("mnli", Tsv, "sentence1\tsentence2\tgold_label\na\tb\t-\n", &["data:2:3:", "\"-\"", "\"neutral\""]),
        ("labels", Tsv, "a\t\n", &["data:1:2:", "the label is empty"]),
        ("labels", Tsv, "a\tb\n \t \tc\n", &["data:2:", "3 columns"]),
        ("labels", Tsv, "x\ty\n\tc\n", &["data:2:", "the text is empty"]),
        ("values", Tsv, "a\t1\nb\thigh\n", &["data:2:2:", "\"high\" is no number", "--task labels"]),
        ("values", Tsv, "a\tnan\n", &["data:1:2:", "no number"]),
        ("values", Tsv, "a\t1e60\n", &["data:1:2:", "no number"]),
        ("stsb", Tsv, "sentence1\tsentence2\tscore\na\tb\t\n", &["data:2:3:", "no number"]),
        (
            "sst2",
            Jsonl,
            "{\"sentence\": \"a\"}",
            &["data:1:", "no \"label\" among the keys \"sentence\"", "--task sst2"],
        ),
        ("sst2", Jsonl, "{\"text\": \"a\", \"label\": 1}", &["data:1:", "no \"sentence\""]),
        ("sst2", Jsonl, "{\"sentence\": 3, \"label\": 1}", &["\"sentence\" is a number in place of a string"]),
        ("sst2", Jsonl, "{\"sentence\": \"a\", \"label\": -1}", &["data:1:", "label \"-1\""]),
        ("sst2", Jsonl, "{\"sentence\": \"a\", \"label\": null}", &["\"label\" is null"]),
        ("rte", Jsonl, "{\"sentence1\": \"a\", \"label\": 0}", &["no \"sentence2\""]),
        ("values", Jsonl, "{\"text\": \"a\", \"value\": \"x\"}", &["data:1:", "\"x\" is no number"]),
        ("labels", Jsonl, "[{\"text\": \"a\", \"label\": 1}]", &["an array in place of an object"]),
        ("labels", Jsonl, "{\"text\": \"a\", \"label\": 1", &["data:1:", "not valid JSON"]),
        ("e2e", Tsv, "a\tb\n", &["--format tsv has no prompts", "--task e2e"]),
        ("e2e", Format::Text, "a", &["--format text has no prompts"]),
        ("e2e", E2e, "a||b\n\na\n", &["data:3:", "no '||'"]),
        ("e2e", E2e, "a||\n", &["data:1:", "the reference is empty"]),
        ("e2e", Jsonl, "{\"prompt\": \"a\"}", &["data:1:", "\"completion\""]),
        (
            "e2e",
            Jsonl,
            "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"text\": \"a\"}",
            &["data:2:", "a text without a prompt", "--task e2e"],
        ),
        (
            "e2e",
            Jsonl,
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#,
            &["data:1:", "there is a conversation", "--task e2e"],
        ),
    ];
    for (name, format, file, parts) in table {
        let error = read(name, *format, file).unwrap_err().to_string();
        assert!(error.contains("data"), "{name}, {file:?}: no file in: {error}");
        for part in *parts {
            assert!(error.contains(part), "{name}, {file:?}: no {part:?} in: {error}");
        }
    }
    let error = task("glue").unwrap_err().to_string();
    assert!(error.contains("'glue'") && error.contains("sst2, mrpc"), "{error}");
    assert!(with_file(b"a\tb", |p| data::read(p, Format::Tsv)).unwrap_err().to_string().contains("--task labels"));
    assert!(TASKS.iter().all(|t| task(t.name).unwrap().name == t.name && !t.metrics.is_empty()));
}

/// A tokenizer may put nothing around texts and make nothing of one.
#[test]
fn a_text_without_tokens_is_refused_with_its_line() {
    struct Nothing;
    impl data::Join for Nothing {
        fn join(&self, text: &str, _: Option<&str>, _: usize) -> Result<Joined, data::EncodeError> {
            let ids: Vec<u32> = text.bytes().filter(u8::is_ascii).map(u32::from).collect();
            Ok(Joined { second_from: ids.len(), ids, cut: false })
        }
        fn around(&self, _: bool) -> usize {
            0
        }
        fn vocab_size(&self) -> usize {
            128
        }
    }
    let row = task("values").unwrap();
    let corpus = with_file("a\t1\n\u{200b}\t2\n".as_bytes(), |path| read_task(path, row, Format::Tsv).unwrap());
    let error = encode_task(&corpus, row, None, &Nothing, 9).unwrap_err().to_string();
    assert!(error.contains("data:2: the tokenizer makes no token"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let model = load(&encoder(dir.path(), "bert_classification", |_| ()), &Device::Cpu).unwrap();
    let error = model.batch(&Adapted::none(&Device::Cpu).unwrap(), &lora_model::Texts::new(&[5, 6, 7], &[3, 0]));
    assert!(matches!(error, Err(lora_model::Error::NoTokens { index: 1 })));
}

#[test]
fn labels_and_their_order() {
    let labels = |name: &str, file: &str| {
        with_file(file.as_bytes(), |path| {
            let row = task(name).unwrap();
            Labels::of(row, &read_task(path, row, Format::Tsv).unwrap()).map(|l| l.map(|l| l.names().to_vec()))
        })
    };
    assert_eq!(labels("labels", "a\tno\nb\tyes\nc\tno\nd\tMaybe\n").unwrap().unwrap(), ["Maybe", "no", "yes"]);
    assert_eq!(labels("labels", "a\t10\nb\t9\nc\t-1\n").unwrap().unwrap(), ["-1", "9", "10"]);
    // GLUE's order, whatever the data has.
    let one = "sentence1\tsentence2\tgold_label\na\tb\tneutral\n";
    assert_eq!(labels("mnli", one).unwrap().unwrap(), ["entailment", "neutral", "contradiction"]);
    assert_eq!(labels("values", "a\t1\n").unwrap(), None);
    let error = labels("labels", "a\tx\nb\tx\n").unwrap_err().to_string();
    assert!(error.contains("every example has the label \"x\""), "{error}");
    let of = |names: &[&str]| Labels::new(names.iter().map(|n| n.to_string()).collect());
    let names = |names: &[&str]| names.iter().map(|n| n.to_string()).collect::<Vec<_>>();
    assert_eq!(of(&["a", "b"]).ordered_as(&names(&["B", "A"])), Some(of(&["b", "a"])));
    for other in [&["a"][..], &["a", "c"], &["a", "a"], &["a", "b", "c"], &[]] {
        assert_eq!(of(&["a", "b"]).ordered_as(&names(other)), None, "{other:?}");
    }
}

/// An encoder of an architecture by the name of its golden folder, with `change` to its configuration.
fn encoder(dir: &Path, golden: &str, change: impl FnOnce(&mut RawConfig)) -> PathBuf {
    let path = crate::common::golden().into_iter().find(|g| g.parent().unwrap().ends_with(golden)).unwrap();
    let base = dir.join(golden);
    crate::common::base(&path, &base, change);
    base
}

#[test]
fn pairs_stand_between_tokens_and_are_cut_longest_first() {
    let dir = tempfile::tempdir().unwrap();
    for (golden, segments) in [("bert_classification", true), ("roberta_classification", false)] {
        let base = encoder(dir.path(), golden, |_| ());
        let model = load(&base, &Device::Cpu).unwrap();
        let joiner = TextJoiner::from_dir(&base, &*model).unwrap();
        let row = task("labels").unwrap();
        let corpus = with_file(b"N1 serves F2 .\tF2\tyes\nN1\t\tno\n", |p| read_task(p, row, Format::Tsv).unwrap());
        let labels = Labels::of(row, &corpus).unwrap();
        let encode = |length| encode_task(&corpus, row, labels.as_ref(), &joiner, length);
        let whole = encode(99).unwrap();
        let end = whole.sequences[0].tokens[0];
        let around: Vec<usize> =
            (0..whole.sequences[0].tokens.len()).filter(|&i| whole.sequences[0].tokens[i] == end).collect();
        let n = whole.sequences[0].tokens.len();
        assert!(around.len() == 3 && around[0] == 0 && around[2] == n - 1, "{whole:?}");
        assert_eq!(whole.sequences[0].second_from, if segments { around[1] + 1 } else { n });
        assert!(whole.sequences[0].goal == Goal::Label(1) && whole.sequences[1].goal == Goal::Label(0));
        assert_eq!((whole.cut, whole.metrics), (0, &[Metric::Accuracy, Metric::Matthews][..]));
        // The first text is the longer one and loses its end; the second stays whole.
        let second = n - 2 - around[1];
        let cut = encode(3 + 2 * second).unwrap();
        assert_eq!(cut.cut, 1);
        let (short, long) = (&cut.sequences[0].tokens, &whole.sequences[0].tokens);
        assert_eq!(short[..=second], long[..=second], "{golden}");
        assert_eq!(short[second + 1..], long[around[1]..], "{golden}");
        let error = encode(4).unwrap_err().to_string();
        assert!(error.contains("length of 4") && error.contains("at least 5"), "{error}");
        let other = with_file(b"a\tyes\nb\tperhaps\n", |p| read_task(p, row, Format::Tsv).unwrap());
        let error = encode_task(&other, row, labels.as_ref(), &joiner, 99).unwrap_err().to_string();
        assert!(error.contains("data:2: the label \"perhaps\" is none of \"no\", \"yes\""), "{error}");
    }
}

fn config(base: &Path, task: &str, data: PathBuf, out: PathBuf) -> TrainConfig {
    TrainConfig {
        model: base.into(),
        task: Some(task.into()),
        data,
        out,
        rank: 2,
        bottleneck: 3,
        targets: ["query", "value"].into_iter().collect(),
        steps: Some(4),
        batch_size: 6,
        max_length: 20,
        lr: 5e-3,
        ..TrainConfig::default()
    }
}

/// However a step is split, its losses are the same, with dropout everywhere, in the head as well.
#[test]
fn splitting_a_step_changes_no_mask() {
    let dir = tempfile::tempdir().unwrap();
    for golden in ["bert_classification", "roberta_classification", "deberta_v2_classification"] {
        let targets = if golden.starts_with("deberta") { ["query_proj", "value_proj"] } else { ["query", "value"] };
        let base = encoder(dir.path(), golden, |raw| {
            // The head's alone, and strong: other masks make another loss.
            for key in ["hidden_dropout_prob", "attention_probs_dropout_prob"] {
                raw.set(key, 0.0);
            }
            for key in ["classifier_dropout", "pooler_dropout", "cls_dropout"] {
                raw.set(key, 0.5);
            }
        });
        let model = load(&base, &Device::Cpu).unwrap();
        let file = dir.path().join("pairs.tsv");
        fs::write(&file, crate::common::pairs(|i| format!("{}", i % 3))).unwrap();
        let row = task("labels").unwrap();
        let corpus = read_task(&file, row, Format::Tsv).unwrap();
        let fitted = Fitted::to_train(row, &base, None, &corpus).unwrap();
        let none = Adapted::none(&Device::Cpu).unwrap();
        let joiner = TextJoiner::from_dir(&base, &*model).unwrap();
        let data = fitted.encode(&corpus, &joiner, &*model, &none, 20).unwrap();
        let steps = |grad_accum: usize, seed: u64| -> Vec<Step> {
            let out = dir.path().join("out");
            let targets = targets.map(String::from).to_vec();
            let config =
                TrainConfig { grad_accum, seed, targets: targets.into(), ..config(&base, "labels", file.clone(), out) };
            let method = config.method_options().unwrap();
            let adapted = Adapted::new(&*method, &*model, &Device::Cpu, DType::F32, 3).unwrap();
            let mut trainer = Trainer::new(&*model, adapted, &config, data.sequences.len()).unwrap();
            (0..4).map(|_| trainer.step(&data).unwrap()).collect()
        };
        let whole = steps(1, 0);
        for split in [2, 3, 6] {
            for (a, b) in whole.iter().zip(steps(split, 0)) {
                let near = |x: f64, y: f64| (x - y).abs() < 1e-5 * x.abs();
                assert!(near(a.loss, b.loss) && near(a.grad_norm, b.grad_norm), "{golden}, {split}: {a:?}, {b:?}");
            }
        }
        assert!((whole[0].loss - steps(1, 1)[0].loss).abs() > 1e-3, "{golden}: nothing is dropped");
    }
}

/// Loss and metrics of an evaluation against what they are by hand, and against the training loss.
#[test]
fn an_evaluation_judges_predictions() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pairs.tsv");
    for (golden, name) in [("bert_classification", "labels"), ("roberta_regression", "values")] {
        let base = encoder(dir.path(), golden, |_| ());
        let model = load(&base, &Device::Cpu).unwrap();
        fs::write(&file, crate::common::pairs(|i| format!("{}", i % 3))).unwrap();
        let row = task(name).unwrap();
        let corpus = read_task(&file, row, Format::Tsv).unwrap();
        let fitted = Fitted::to_train(row, &base, None, &corpus).unwrap();
        let none = Adapted::none(&Device::Cpu).unwrap();
        let joiner = TextJoiner::from_dir(&base, &*model).unwrap();
        let data = fitted.encode(&corpus, &joiner, &*model, &none, 20).unwrap();
        let Evaluation { loss, perplexity, targets, scores } = evaluate(&*model, &none, &data, 7).unwrap();
        assert_eq!((perplexity, targets), (None, 30));
        assert_eq!(scores.0.iter().map(|(m, _)| *m).collect::<Vec<_>>(), row.metrics);
        let mut sum = 0.0;
        let (mut predicted, mut labels, mut numbers) = (Vec::new(), Vec::new(), Vec::new());
        for batch in data.batches(1) {
            let on_device = model.batch(&none, &batch.texts()).unwrap();
            let mut tape = lora_core::Tape::inference(&none.params);
            sum += model.loss(&mut tape, &none, &on_device, 0.0, 1.0).unwrap().value().to_f64().unwrap()[0];
            let logits = model.logits(&none, &on_device).unwrap().to_f64().unwrap();
            match &batch.targets {
                data::Targets::Labels(l) => {
                    let best = (0..3).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
                    predicted.push(best as f64);
                    labels.push(l[0]);
                }
                data::Targets::Values(v) => {
                    predicted.push(logits[0]);
                    numbers.push(f64::from(v[0]));
                }
                other => panic!("{other:?}"),
            }
        }
        assert!((loss - sum / 30.0).abs() < 1e-5 * loss, "{name}: {loss}, not {}", sum / 30.0);
        for (metric, value) in scores.0 {
            let expected = match row.kind {
                TaskKind::Values => metric.of_values(&predicted, &numbers),
                TaskKind::Labels(_) => {
                    let predicted: Vec<u32> = predicted.iter().map(|&p| p as u32).collect();
                    metric.of_labels(&predicted, &labels, 1)
                }
                TaskKind::Completions => None,
            };
            assert!((value - expected.unwrap()).abs() < 1e-6, "{name}: {metric} {value}, not {expected:?}");
        }
    }
}

/// A base may have the labels in another order than the task; F₁ is of the one that is called 1.
#[test]
fn f1_is_of_the_label_1_whichever_output_that_is() {
    let dir = tempfile::tempdir().unwrap();
    let base = encoder(dir.path(), "bert_classification", |raw| {
        raw.set("architectures", vec!["BertModel"]);
        raw.set("id2label", serde_json::json!({"0": "1", "1": "0"}));
    });
    let (mrpc, file) = (task("mrpc").unwrap(), dir.path().join("pairs.tsv"));
    let rows: String = (0..12).map(|i| format!("{}\ta {i}\tb\n", usize::from(i % 4 > 0))).collect();
    fs::write(&file, format!("Quality\t#1 String\t#2 String\n{rows}")).unwrap();
    let corpus = read_task(&file, mrpc, Format::Tsv).unwrap();
    let fitted = Fitted::to_train(mrpc, &base, None, &corpus).unwrap();
    assert_eq!(fitted.labels.as_ref().unwrap().names(), ["1", "0"]);
    let model = fitted.load(&base, &Device::Cpu, DType::F32, 1, false).unwrap();
    let none = Adapted::none(&Device::Cpu).unwrap();
    let joiner = TextJoiner::from_dir(&base, &*model).unwrap();
    let data = fitted.encode(&corpus, &joiner, &*model, &none, 20).unwrap();
    let scores = evaluate(&*model, &none, &data, 5).unwrap().scores.0;
    let f1 = scores.iter().find(|(m, _)| *m == Metric::F1).unwrap().1;
    let best = |seq: &data::Sequence| {
        let one = data::Dataset::new(vec![seq.clone()]);
        let batch = model.batch(&none, &one.batches(1).next().unwrap().texts()).unwrap();
        let logits = model.logits(&none, &batch).unwrap().to_f64().unwrap();
        u32::from(logits[1] > logits[0])
    };
    let (mut both, mut said, mut true_ones) = (0.0, 0.0, 0.0);
    for (i, seq) in data.sequences.iter().enumerate() {
        let (says, is) = (best(seq) == 0, i % 4 > 0);
        both += f64::from(u8::from(says && is));
        said += f64::from(u8::from(says));
        true_ones += f64::from(u8::from(is));
    }
    assert!((f1 - 2.0 * both / (said + true_ones)).abs() < 1e-12, "{f1}: {both} of {said} and {true_ones}");
    // Of a held-out part it is of the same label.
    let positive = data.positive;
    let (rest, held_out) = data.hold_out(0.5).unwrap();
    assert_eq!([rest.positive, held_out.positive], [positive; 2]);
}

/// The metrics of values that are no numbers would look like some.
#[test]
fn what_is_no_number_is_not_judged() {
    let dir = tempfile::tempdir().unwrap();
    let base = encoder(dir.path(), "bert_classification", |_| ());
    let file = dir.path().join("pairs.tsv");
    fs::write(&file, crate::common::pairs(|i| if i % 3 == 0 { "yes".into() } else { "no".into() })).unwrap();
    let row = task("labels").unwrap();
    let corpus = read_task(&file, row, Format::Tsv).unwrap();
    let fitted = Fitted::to_train(row, &base, None, &corpus).unwrap();
    let model = fitted.load(&base, &Device::Cpu, DType::F32, 1, false).unwrap();
    let config = TrainConfig { method: "bitfit".into(), ..TrainConfig::default() };
    let mut adapted = Adapted::new(&*config.method_options().unwrap(), &*model, &Device::Cpu, DType::F32, 0).unwrap();
    let joiner = TextJoiner::from_dir(&base, &*model).unwrap();
    let data = fitted.encode(&corpus, &joiner, &*model, &adapted, 20).unwrap();
    evaluate(&*model, &adapted, &data, 5).unwrap();
    lora_kernels::fill(f64::NAN, adapted.params.flat_mut().unwrap()).unwrap();
    let e = evaluate(&*model, &adapted, &data, 5).unwrap_err();
    assert!(matches!(e, Error::NotFinite { loss } if loss.is_nan()), "{e}");
    let trainer = Trainer::new(&*model, adapted, &config, data.sequences.len()).unwrap();
    assert!(matches!(trainer.evaluate(&data), Err(Error::Diverged { step: 0, .. })));
}

/// A folder of a bare encoder gets a head, and what was trained is the same after it was saved and loaded.
#[test]
fn a_result_remembers_its_labels() {
    let dir = tempfile::tempdir().unwrap();
    let base = encoder(dir.path(), "bert_classification", |raw| raw.set("architectures", vec!["BertModel"]));
    let file = dir.path().join("pairs.tsv");
    fs::write(&file, crate::common::pairs(|i| ["good", "bad", "ugly", "none"][i % 4].into())).unwrap();
    let row = task("labels").unwrap();
    let corpus = read_task(&file, row, Format::Tsv).unwrap();
    let names = ["bad", "good", "none", "ugly"];
    for method in ["lora", "adapter-p", "full"] {
        let out = dir.path().join(method);
        let run = TrainConfig {
            method: method.into(),
            valid: Some(file.clone()),
            ..config(&base, "labels", file.clone(), out.clone())
        };
        let summary = train(&run, false, &mut ()).unwrap();
        let whole = method == "full";
        let adapter = (!whole).then_some(out.as_path());
        let from = if whole { &out } else { &base };
        let fitted = Fitted::trained(row, from, adapter).unwrap();
        assert_eq!(fitted.labels.as_ref().unwrap().names(), names, "{method}");
        let (cpu, dtype) = (Device::Cpu, DType::F32);
        let (model, adapted) = match adapter {
            None => (fitted.load(from, &cpu, dtype, 99, false).unwrap(), Adapted::none(&cpu).unwrap()),
            Some(dir) => load_with_adapter(from, dir, &cpu, dtype).unwrap(),
        };
        let joiner = TextJoiner::from_dir(from, &*model).unwrap();
        let data = fitted.encode(&corpus, &joiner, &*model, &adapted, 20).unwrap();
        let again = evaluate(&*model, &adapted, &data, 6).unwrap();
        let there = summary.evaluation.unwrap();
        // A merged bias or norm is rounded once more; what was loaded is what was trained.
        assert_eq!(again, there, "{method}");
        if whole {
            let raw = RawConfig::from_dir(&out).unwrap();
            assert_eq!(raw.value("label2id").unwrap()["ugly"], 3);
            // It trains on with its own order of labels, in which others may not follow.
            assert!(Fitted::trained(task("sst2").unwrap(), &out, None).is_err());
        } else {
            assert_eq!(of_adapter(&out).unwrap().unwrap().task.name, "labels");
            let error = Fitted::trained(task("stsb").unwrap(), &base, adapter).unwrap_err().to_string();
            assert!(error.contains("was trained for labels"), "{error}");
            let more = TrainConfig { init_adapter: adapter.map(Into::into), ..run };
            let fewer = dir.path().join("fewer.tsv");
            fs::write(&fewer, crate::common::pairs(|i| ["ugly", "bad"][i % 2].into())).unwrap();
            let out = dir.path().join(format!("{method}-more"));
            train(&TrainConfig { data: fewer, out: out.clone(), ..more }, false, &mut ()).unwrap();
            assert_eq!(of_adapter(&out).unwrap().unwrap().labels.unwrap().names(), names, "{method}");
        }
    }
    // Completions need no head, and no adapter for them says what it is for.
    let e2e = task("e2e").unwrap();
    for error in [Fitted::trained(e2e, &base, None), Fitted::to_train(e2e, &base, None, &corpus)] {
        let error = error.unwrap_err().to_string();
        assert!(error.contains("task = e2e") && error.contains("no head"), "{error}");
    }
    let mut file: Value =
        serde_json::from_str(&fs::read_to_string(dir.path().join("lora").join(FILE)).unwrap()).unwrap();
    file["task"] = "what".into();
    fs::write(dir.path().join("lora").join(FILE), file.to_string()).unwrap();
    let error = of_adapter(&dir.path().join("lora")).unwrap_err().to_string();
    assert!(error.contains(FILE) && error.contains("'what'"), "{error}");
}

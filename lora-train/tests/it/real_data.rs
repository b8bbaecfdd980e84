//! The files as their publishers give them out, where they are at hand.

use lora_train::{
    data::{self, Answer, Content, Corpus},
    task,
};

use crate::common::real_data;

fn read(folder: &str, file: &str, task: &str) -> Option<Corpus> {
    let path = real_data(folder, file)?;
    Some(task::read(&path, data::task(task).unwrap(), None).unwrap())
}

fn count(corpus: &Corpus, label: &str) -> usize {
    let is = |e: &&data::Example| match &e.content {
        Content::Labelled { answer: Answer::Label(name), .. } => name == label,
        other => panic!("{other:?}"),
    };
    corpus.examples.iter().filter(is).count()
}

#[test]
fn mrpc_has_a_byte_order_mark_and_quotes_that_never_close() {
    for (file, rows, same, unbalanced) in
        [("msr_paraphrase_train.txt", 4_076, 2_753, 139), ("msr_paraphrase_test.txt", 1_725, 1_147, 50)]
    {
        let Some(corpus) = read("mrpc", file, "mrpc") else { return };
        assert_eq!((corpus.examples.len(), count(&corpus, "1")), (rows, same), "{file}");
        assert_eq!(count(&corpus, "0"), rows - same);
        let quotes = |e: &&data::Example| match &e.content {
            Content::Labelled { text, .. } => text.matches('"').count() % 2 == 1,
            _ => false,
        };
        assert_eq!(corpus.examples.iter().filter(quotes).count(), unbalanced, "{file}");
        // The line after the headings.
        assert_eq!(corpus.examples[0].line, 2);
    }
    let corpus = read("mrpc", "msr_paraphrase_train.txt", "mrpc").unwrap();
    let Content::Labelled { text, second, .. } = &corpus.examples[0].content else { panic!() };
    assert!(text.starts_with("Amrozi accused his brother , whom he called \" the witness \" ,"), "{text}");
    assert!(second.as_ref().unwrap().starts_with("Referring to him as only \" the witness \" ,"), "{second:?}");
}

#[test]
fn sst2_has_no_headings() {
    for (file, rows, positive) in [("train.tsv", 6_920, 3_610), ("dev.tsv", 872, 444), ("test.tsv", 1_821, 909)] {
        let Some(corpus) = read("sst2", file, "sst2") else { return };
        assert_eq!((corpus.examples.len(), corpus.examples[0].line), (rows, 1), "{file}");
        assert_eq!((count(&corpus, "1"), count(&corpus, "0")), (positive, rows - positive), "{file}");
    }
}

#[test]
fn e2e_has_several_references_for_a_prompt() {
    let Some(corpus) = read("e2e", "test.txt", "e2e") else { return };
    let prompts = data::references(&corpus);
    assert_eq!((corpus.examples.len(), prompts.len()), (4_693, 630));
    assert_eq!(prompts.iter().map(|p| p.texts.len()).sum::<usize>(), 4_693);
}

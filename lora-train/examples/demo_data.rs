//! Writes the demo's little world into a folder: `prose.txt` to pretrain on, `train.txt` and `valid.txt` to adapt on, and
//! `test.txt` with several references for each record.
//!
//!     cargo run --release -p lora-train --example demo_data -- FOLDER

use std::{error::Error, fs, path::PathBuf};

use lora_train::demo_data::{Downstream, lines, retold, upstream_text};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = PathBuf::from(std::env::args().nth(1).ok_or("name a folder to write into")?);
    fs::create_dir_all(&folder)?;
    let Downstream { train, valid } = Downstream::new(0, 2000, 400);
    // The same records as those of `valid`, of which these are held out twice.
    let (test, valid) = (retold(0, 200, 4), &valid[200..]);
    let pair = |(record, ways): &(String, Vec<String>)| {
        ways.iter().map(|way| (record.clone(), way.clone())).collect::<Vec<_>>()
    };
    for (name, text) in [
        ("prose.txt", upstream_text(0, 1_000_000)),
        ("train.txt", lines(&train)),
        ("valid.txt", lines(valid)),
        ("test.txt", lines(&test.iter().flat_map(pair).collect::<Vec<_>>())),
    ] {
        fs::write(folder.join(name), text)?;
    }
    Ok(())
}

//! `lora bench-latency`.

use std::{process::Command, time::Duration};

use crate::cli::lab::Lab;

const VARIANTS: [&str; 6] = ["base", "lora, merged", "lora", "adapter-l", "adapter-h", "pre-layer"];

#[test]
fn every_variant_is_measured_and_reported_in_every_form() {
    let lab = Lab::new();
    let run = "bench-latency --model base --shapes 2x8@2k,1x4 --rounds 3,5 --prefix 3";
    let text = lab.ok(&format!("{run} --out report.md"));
    assert_eq!(text, lab.read("report.md"));
    assert!(text.contains("2 × 8 tokens, 3 rounds") && text.contains("1 × 4 tokens, 5 rounds"), "{text}");
    let report = lab.json(&format!("{run} --out report.json --json"));
    assert_eq!(serde_json::from_str::<serde_json::Value>(&lab.read("report.json")).unwrap(), report);
    assert_eq!((&report["random_weights"], &report["interrupted"]), (&false.into(), &false.into()));
    for shape in report["shapes"].as_array().unwrap() {
        let rows = shape["rows"].as_array().unwrap();
        let names: Vec<_> = rows.iter().map(|r| r["name"].as_str().unwrap()).collect();
        assert_eq!(names, VARIANTS);
        for row in rows {
            assert!(text.contains(row["setting"].as_str().unwrap()), "{text}");
            let of = |what: &str, key: &str| row[what][key].as_f64().unwrap();
            let keys = ["min", "q1", "median", "q3", "max"];
            assert!(of("ms", "min") > 0.0);
            assert!(["ms", "ratio"].iter().all(|what| keys.map(|key| of(what, key)).is_sorted()), "{row}");
        }
        assert_eq!((rows[0]["scalars"].as_u64(), rows[0]["ratio"]["max"].as_f64()), (Some(0), Some(1.0)));
        assert_eq!(rows[5]["scalars"], 2 * 2 * 16 * 3);
    }
    // About as many parameters as were asked for, and by the option otherwise.
    let adapter = |report: &serde_json::Value| report["shapes"][0]["rows"][3]["scalars"].as_f64().unwrap();
    assert!((adapter(&report) - 2000.0).abs() < 50.0, "{}", adapter(&report));
    let wide = lab.json("bench-latency --model base --shapes 1x4@2k --rounds 1 --bottleneck 1 --json --rank 1");
    assert_eq!(adapter(&wide), (2 * (2 * 16 + 1 + 16 + 2 * 16)) as f64);
}

/// What has no place for the prefix is measured without it.
#[test]
fn a_prefix_that_does_not_fit_is_left_out() {
    let lab = Lab::new();
    for (args, why) in [
        ("--shapes 1x64", "a prefix of 14"),
        ("--shapes 1x51", "a prefix of 14"),
        ("--shapes 1x50", ""),
        ("--shapes 1x64 --prefix 0", "no virtual tokens"),
    ] {
        let report = lab.json(&format!("bench-latency --model base --rounds 1 {args} --json"));
        let shape = &report["shapes"][0];
        let there = shape["rows"].as_array().unwrap().iter().any(|row| row["name"] == "pre-layer");
        let left_out = shape["left_out"].as_array().unwrap().iter().filter_map(|why| why.as_str());
        let left_out: Vec<&str> = left_out.filter(|why| why.contains("pre-layer")).collect();
        assert_eq!((there, left_out.len()), (why.is_empty(), usize::from(!why.is_empty())), "{args}: {report}");
        assert!(left_out.iter().all(|text| text.contains(why)), "{args}: {left_out:?}");
    }
}

#[test]
fn ctrl_c_reports_the_rounds_that_are_whole() {
    let lab = Lab::new();
    let run = "bench-latency --model base --shapes 1x4 --rounds 1000000 --out report.json";
    let stopped_after = |seconds: u64| {
        let mut child = lab.spawn(run);
        std::thread::sleep(Duration::from_secs(seconds));
        assert!(child.try_wait().unwrap().is_none(), "a million rounds are not done at once");
        let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        assert!(killed.success());
        child.wait_with_output().unwrap()
    };
    // Where there is much else to do the first round takes longer.
    let mut output = stopped_after(1);
    for seconds in [4, 16] {
        if !lab.path("report.json").exists() {
            output = stopped_after(seconds);
        }
    }
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(130), "{err}");
    assert!(out.contains("Stopped before its last round") && err.contains("interrupted"), "{out}{err}");
    let report: serde_json::Value = serde_json::from_str(&lab.read("report.json")).unwrap();
    assert!(report["interrupted"] == true && report["shapes"][0]["rounds"].as_u64().unwrap() > 0);
}

#[test]
fn what_cannot_be_measured_is_said_before_anything_is() {
    let lab = Lab::new();
    for (args, parts) in [
        ("--shapes 1x4", &["--arch is missing"][..]),
        ("--arch gpt5", &["arch = gpt5", "gpt2-medium"]),
        ("--arch gpt2 --model base", &["--model"]),
        ("--model nowhere", &["nowhere"]),
        ("--model base --shapes 4", &["4", "BATCHxTOKENS"]),
        ("--model base --shapes 0x4", &["BATCHxTOKENS"]),
        ("--model base --shapes 1x65", &["1x65", "64 positions"]),
        ("--model base --shapes 1x4 --rounds 0", &["rounds = 0"]),
        ("--model base --shapes 1x4 --rounds 1,2", &["rounds = 1,2", "one for each"]),
        ("--model base --shapes 1x4 --rank 0", &["rank = 0"]),
        ("--model base --shapes 1x4 --bottleneck 0", &["bottleneck = 0"]),
        ("--model base --shapes 1x4 --prefix 64", &["prefix = 64"]),
        ("--model base --shapes 1x4 --targets nothing", &["nothing"]),
        ("--model base --shapes 1x4 --device gpu", &["device = gpu"]),
        ("--model base --shapes 1x4 --out report.txt", &["report.txt", ".md or .json"]),
        ("--model base --shapes 1x4 --out no/report.md", &["there is no folder no"]),
    ] {
        lab.fails(&format!("bench-latency {args}"), parts);
    }
}

//! Long inputs, of which what is said about them is longer still, in two lengths.

use crate::cost::{Cost, Verdicts};
use crate::generate::{end_of_ram, header, start};
use crate::program::run;
use qevm_savevm::command::Command as StreamCommand;
use qevm_savevm::ram::BlockId;
use std::process::Command;

/// Makes an input of this many things.
type Make = fn(u64) -> Vec<u8>;

/// What is read, and of how many things it is made first.
const INPUTS: [(&str, u64, Make); 5] = [
    ("commands", 40_000, |count| {
        let mut stream = start(&[4096]);
        (0..count).for_each(|i| stream.command(StreamCommand::Ping(i as u32)).unwrap());
        end_of_ram(&mut stream, |_| {});
        stream.eof().unwrap();
        stream.take()
    }),
    ("sections", 15_000, |count| {
        let mut stream = start(&[4096]);
        end_of_ram(&mut stream, |_| {});
        (0..count).for_each(|i| stream.section_full(&header(9 + i as u32, "a", i as u32, 1), &[1]).unwrap());
        stream.eof().unwrap();
        stream.take()
    }),
    ("zero pages far apart", 20_000, |count| {
        let mut stream = start(&[1 << 50]);
        end_of_ram(&mut stream, |stream| (0..count).for_each(|i| stream.zero_page(BlockId(0), i << 26).unwrap()));
        stream.eof().unwrap();
        stream.take()
    }),
    ("described fields", 5_000, |count| {
        let fields: Vec<_> = (0..count).map(|i| format!(r#"{{"name":"{}","type":"uint8","size":1}}"#, i % 3)).collect();
        described(&fields.join(","), count)
    }),
    ("an array with long names", 20_000, |count| {
        let name = "n".repeat(200);
        let inside =
            format!(r#"{{"vmsd_name":"v","version":1,"fields":[{{"name":"{name}","type":"uint8","size":1}}]}}"#);
        let array = r#""type":"struct","size":1,"array_len""#;
        described(&format!(r#"{{"name":"{name}",{array}:{count},"struct":{inside}}}"#), count)
    }),
];

fn described(fields: &str, len: u64) -> Vec<u8> {
    let mut stream = start(&[4096]);
    end_of_ram(&mut stream, |_| {});
    stream.section_full(&header(9, "d", 0, 1), &vec![1; len as usize]).unwrap();
    stream.eof().unwrap();
    let device = format!(r#"{{"name":"d","instance_id":0,"vmsd_name":"d","version":1,"fields":[{fields}]}}"#);
    stream.vmdesc(&format!(r#"{{"devices":[{device}]}}"#)).unwrap();
    stream.take()
}

const COMMANDS: [&[&str]; 5] = [
    &["inspect", "--json", "--fields", "--records", "IN"],
    &["verify", "--json", "IN"],
    &["diff", "IN", "IN"],
    &["check", "IN", "--against", "IN"],
    &["extract", "IN", "--devices=DIR/devices.json"],
];

#[test]
fn long_inputs_are_worth_what_they_cost() {
    let mut verdicts = Verdicts::default();
    for (what, count, make) in INPUTS {
        // Each is made once, for all commands: that takes as long as reading it.
        let inputs = [count, 2 * count].map(|count| {
            let dir = tempfile::tempdir().unwrap();
            let bytes = make(count);
            std::fs::write(dir.path().join("in"), &bytes).unwrap();
            (count, dir, bytes.len() as u64)
        });
        for arguments in COMMANDS {
            let costs = inputs.each_ref().map(|(count, dir, len)| {
                let place = dir.path().display().to_string();
                let mut command = Command::new(env!("CARGO_BIN_EXE_qevm-judged"));
                let words =
                    arguments.iter().map(|word| word.replace("IN", &format!("{place}/in")).replace("DIR", &place));
                command.args(words).env("TMPDIR", dir.path());
                let used = run(&mut command);
                let cost = Cost { peak: used.peak, calls: used.calls, allocations: 0, moved: used.moved };
                let files = arguments.iter().filter(|word| **word == "IN").count() as u64;
                let what = || format!("{} {count} {what}", arguments.join(" "));
                verdicts.add(what, files * len, cost);
                cost
            });
            if let Err(reason) = costs[0].judge_doubling(&costs[1]) {
                verdicts.beyond.push(format!("{} {what}: {reason}", arguments.join(" ")));
            }
        }
    }
    verdicts.print("long inputs");
}

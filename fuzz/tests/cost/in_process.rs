//! Seeds, hostile streams and ten thousand generated inputs, through the decoders in this process.

use crate::cost::Verdicts;
use crate::drivers::{self, Files, measure};
use crate::generate::{Random, files, hostile, mutate, repository, stream};
use qevm_inspect::ram::Keep;
use std::path::Path;

const GENERATED: u64 = 10_000;
/// As many threads as judge at a time. Costs are counted for each.
const THREADS: u64 = 2;

/// Every seed with its target.
fn seeds() -> Vec<(&'static str, qevm_fuzz::Target, String, Vec<u8>)> {
    let folder = repository().join("fuzz/seeds");
    let all = qevm_fuzz::TARGETS.iter().flat_map(|(name, target)| {
        files(&folder.join(name)).into_iter().map(move |(seed, bytes)| (*name, *target, seed, bytes))
    });
    all.collect()
}

/// The bytes of a file, of which a compressed one has at most 16 MiB.
fn plain(path: &Path) -> Vec<u8> {
    let opened = qevm_inspect::open::open(path, None, false).unwrap_or_else(|_| panic!("{}", path.display()));
    let mut source = opened.source;
    source.fill(16 << 20).expect("a file that can be read");
    source.window().to_vec()
}

fn judge_stream(verdicts: &mut Verdicts, what: impl Fn() -> String, main: Vec<u8>) {
    let files = Files::main(main);
    let n = files.len();
    for (reader, keep) in
        [("walk", Keep::Digests), ("walk with contents", Keep::Image), ("index of pages", Keep::Places)]
    {
        let cost = measure(|| drivers::walk(&files, keep));
        verdicts.add(|| format!("{}, {reader}", what()), n, cost);
    }
    verdicts.add(|| format!("{}, decoder", what()), n, measure(|| drivers::main_channel(&files)));
}

#[test]
fn seeds_and_hostile_streams_are_worth_what_they_cost() {
    let mut verdicts = Verdicts::default();
    for (name, target, seed, bytes) in seeds() {
        let cost = measure(|| {
            target(&bytes);
            0
        });
        verdicts.add(|| format!("{name}/{seed}"), bytes.len() as u64, cost);
        if name == "savevm_decoder" {
            judge_stream(&mut verdicts, || format!("{name}/{seed}"), bytes.get(2..).unwrap_or_default().to_vec());
        }
    }
    for path in hostile() {
        judge_stream(&mut verdicts, || path.display().to_string(), plain(&path));
    }
    verdicts.print("seeds and hostile streams");
}

#[test]
fn ten_thousand_generated_inputs_are_worth_what_they_cost() {
    let seeds = seeds();
    let judge = |thread: u64| {
        let (mut random, mut verdicts) = (Random::new(thread + 1), Verdicts::default());
        for number in (thread..GENERATED).step_by(THREADS as usize) {
            if number % 4 == 0 {
                let bytes = stream(&mut random);
                let bytes = if number % 8 == 0 { mutate(&mut random, &bytes) } else { bytes };
                judge_stream(&mut verdicts, || format!("generated stream {number}"), bytes);
                continue;
            }
            let (name, target, seed, bytes) = &seeds[random.below(seeds.len() as u64) as usize];
            let bytes = mutate(&mut random, bytes);
            let cost = measure(|| {
                target(&bytes);
                0
            });
            verdicts.add(|| format!("{name}/{seed} changed, number {number}"), bytes.len() as u64, cost);
        }
        verdicts
    };
    let mut verdicts = Verdicts::default();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || judge(thread))).collect();
        threads.into_iter().for_each(|thread| verdicts.merge(thread.join().expect("a judge that ends")));
    });
    assert!(verdicts.judged >= GENERATED);
    verdicts.print("generated inputs");
}

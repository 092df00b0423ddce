//! `docs/embedding.md` promises a whole destination and a whole source in 30 lines each; that they work is its
//! doctest's to show.

#[test]
fn a_whole_destination_and_a_whole_source_take_30_lines() {
    let page = include_str!("../docs/embedding.md");
    for function in ["fn receive(", "fn send("] {
        let start = page.find(function).unwrap_or_else(|| panic!("no {function}"));
        let lines = 1 + page[start..].lines().position(|line| line == "}").expect("its end");
        assert!((10..=30).contains(&lines), "{function}: {lines} lines");
    }
}

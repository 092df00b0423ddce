use super::*;
use crate::Message;
use proptest::prelude::*;

const SMALL: u64 = 0x1000;
const HUGE: u64 = 0x20_0000;

fn name(name: &str) -> CountedString {
    CountedString::new(name).unwrap()
}

fn blocks() -> RequestBlocks {
    let block = |text, used_length, page_size| RequestBlock { name: name(text), used_length, page_size };
    RequestBlocks::new(vec![block("pc.ram", 0x100_0000, SMALL), block("huge", 4 * HUGE, HUGE)]).unwrap()
}

fn queue() -> PageRequests {
    PageRequests::new(blocks(), SMALL)
}

fn drain(queue: &mut PageRequests) -> Vec<(usize, u64)> {
    std::iter::from_fn(|| queue.next_page()).map(|page| (page.block, page.offset)).collect()
}

#[test]
fn requests_are_checked_against_their_block() {
    let mut queue = queue();
    let ram = name("pc.ram");
    assert_eq!(queue.request(None, 0, 0x1000), Err(RequestError::NoBlock));
    let other = name("vga.vram");
    assert_eq!(queue.request(Some(&other), 0, 0x1000), Err(RequestError::UnknownBlock { name: other.clone() }));
    assert_eq!(queue.request(None, 0, 0x1000), Err(RequestError::NoBlock), "a refused block is not remembered");
    let mut refused = |start, len| queue.request(Some(&ram), start, len).unwrap_err();
    assert!(matches!(
        refused(0x800, 0x1000),
        RequestError::Unaligned { what: "start", found: 0x800, page_size: SMALL, .. }
    ));
    assert!(matches!(refused(0, 0x1001), RequestError::Unaligned { what: "length", found: 0x1001, .. }));
    assert!(matches!(refused(0, 0), RequestError::Range { len: 0, .. }));
    assert!(matches!(
        refused(0x100_0000, 0x1000),
        RequestError::Range { start: 0x100_0000, used_length: 0x100_0000, .. }
    ));
    assert!(matches!(refused(0xff_f000, 0x2000), RequestError::Range { .. }));
    assert!(matches!(refused(u64::MAX - 0xfff, 0x1000), RequestError::Range { .. }));
    assert_eq!((queue.waiting(), queue.next_page()), (0, None));
}

#[test]
fn pages_go_out_in_the_order_of_their_requests() {
    let mut queue = queue();
    assert_eq!(queue.request(Some(&name("pc.ram")), 0x9000, 0x1000), Ok(1));
    assert_eq!(queue.request(Some(&name("huge")), HUGE + 0x3000, 0x1000), Ok(1), "all of its huge page");
    assert_eq!(queue.request(Some(&name("pc.ram")), 0x1000, 0x3000), Ok(3));
    assert_eq!(queue.waiting(), 5);
    assert_eq!(queue.next_page(), Some(PageRequest { block: 0, offset: 0x9000, len: SMALL }));
    assert_eq!(queue.next_page(), Some(PageRequest { block: 1, offset: HUGE, len: HUGE }));
    assert_eq!(drain(&mut queue), [(0, 0x1000), (0, 0x2000), (0, 0x3000)]);
    assert_eq!(queue.waiting(), 0);
}

#[test]
fn a_flood_of_requests_costs_nothing() {
    let mut queue = queue();
    let ram = name("pc.ram");
    for i in 0..100_000 {
        queue.request(Some(&ram), (i % 3) * SMALL, 0x1000).unwrap();
        queue.request(Some(&ram), 0, 0x100_0000).unwrap();
    }
    assert_eq!(queue.waiting(), 4096);
    assert!(queue.queue.len() <= 4096);
    assert_eq!(drain(&mut queue).len(), 4096);
    // Pages that go out by themselves leave no trace either.
    for _ in 0..100_000 {
        queue.request(Some(&ram), 0, 0x1000).unwrap();
        queue.sent(0, 0);
    }
    assert!(queue.queue.len() < 2000);
    assert_eq!(queue.next_page(), None);
}

#[test]
fn a_new_return_path_names_its_block_again() {
    let mut queue = queue();
    queue.request(Some(&name("pc.ram")), 0, 0x1000).unwrap();
    queue.reconnected();
    assert_eq!(queue.request(None, 0x1000, 0x1000), Err(RequestError::NoBlock));
    assert_eq!(queue.request(Some(&name("pc.ram")), 0, 0x1000), Ok(0), "still waited for");
    assert_eq!(drain(&mut queue), [(0, 0)]);
}

#[test]
fn lists_that_cannot_be_used_are_refused() {
    let list = |page_sizes: &[u64]| {
        let block = |page_size: &u64| RequestBlock { name: name("x"), used_length: 0x1000, page_size: *page_size };
        RequestBlocks::new(page_sizes.iter().map(block).collect()).map(drop)
    };
    assert!(list(&[SMALL]).is_ok());
    for bad in [&[0][..], &[3000], &[1 << 32], &[SMALL, SMALL]] {
        assert!(matches!(list(bad), Err(RequestError::Blocks { .. })), "{bad:?}");
    }
}

#[test]
fn faults_name_their_block_when_it_changes() {
    let mut faults = PageFaults::new(blocks());
    let request = |block: Option<&str>, start, len| Some(Message::ReqPages { block: block.map(name), start, len });
    assert_eq!(faults.fault(0, 0x1fff), Ok(request(Some("pc.ram"), 0x1000, 0x1000)));
    assert_eq!(faults.fault(0, 0x2000), Ok(request(None, 0x2000, 0x1000)));
    assert_eq!(faults.fault(1, HUGE + 5), Ok(request(Some("huge"), HUGE, HUGE as u32)));
    assert_eq!(faults.fault(0, 0x3000), Ok(request(Some("pc.ram"), 0x3000, 0x1000)));
    assert_eq!(faults.fault(0, 0x1000), Ok(None), "asked for");
    assert_eq!(faults.waiting(), 4);
    faults.received(0, 0x1000);
    faults.received(0, 0x7000);
    assert_eq!(faults.waiting(), 3);
    assert!(matches!(faults.fault(0, 0x100_0000), Err(RequestError::Outside { found: 0x100_0000, .. })));
    assert_eq!(faults.fault(9, 0), Err(RequestError::NoSuchBlock { found: 9, blocks: 2 }));
    // As QEMU 5.2 to 11.1 do after recovery: the block is named again, and what has not come is asked for again.
    let again = faults.reconnected();
    let expected = [
        request(Some("pc.ram"), 0x2000, 0x1000),
        request(None, 0x3000, 0x1000),
        request(Some("huge"), HUGE, HUGE as u32),
    ];
    assert_eq!(again, expected.map(Option::unwrap));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Faults, lost connections, requests and background pages in any order: every page that the guest waits for is
    /// sent, and none is sent twice for one request.
    #[test]
    fn every_fault_is_served(steps in prop::collection::vec((0usize..5, 0usize..2, 0u64..8), 1..100)) {
        let (mut faults, mut queue) = (PageFaults::new(blocks()), queue());
        let ask = |message: &Message, queue: &mut PageRequests| match message {
            Message::ReqPages { block, start, len } => queue.request(block.as_ref(), *start, *len).unwrap(),
            _ => unreachable!(),
        };
        for (step, block, page) in steps {
            let offset = page % 4 * blocks().block(block).unwrap().page_size;
            match step {
                0 | 1 => if let Some(message) = faults.fault(block, offset).unwrap() {
                    prop_assert_eq!(ask(&message, &mut queue), 1);
                },
                2 => if let Some(page) = queue.next_page() {
                    faults.received(page.block, page.offset);
                },
                3 => {
                    queue.sent(block, offset);
                    faults.received(block, offset);
                }
                _ => {
                    queue.reconnected();
                    for message in faults.reconnected() {
                        ask(&message, &mut queue);
                    }
                }
            }
            prop_assert_eq!(faults.waiting(), queue.waiting());
        }
        while let Some(page) = queue.next_page() {
            faults.received(page.block, page.offset);
        }
        prop_assert_eq!(faults.waiting(), 0);
    }
}

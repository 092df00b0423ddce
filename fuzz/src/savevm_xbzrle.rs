use qevm_savevm::xbzrle;

/// Applies the input as a difference to a page, and makes differences of the page before and after.
pub fn savevm_xbzrle(data: &[u8]) {
    let old = vec![0x5a; 4096];
    let mut new = old.clone();
    // What was applied before an error is as good a page as any other.
    let _ = xbzrle::decode(data, 0, &mut new);
    let mut difference = Vec::new();
    if xbzrle::encode(&old, &new, &mut difference).is_some() {
        assert!(difference.len() <= new.len());
        let mut again = old;
        xbzrle::decode(&difference, 0, &mut again).expect("what was made can be applied");
        assert_eq!(again, new);
    }
}

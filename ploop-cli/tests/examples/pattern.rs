//! Comparing what was printed with what the document says.

/// Whether `text` is what `expected` says: `[..]` within a line is any text, a line `...` any number of lines.
pub(crate) fn matches(expected: &[String], text: &str) -> bool {
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    let mut end = lines.len();
    while end > 0 && lines[end - 1].is_empty() {
        end -= 1;
    }
    lines_match(expected, &lines[..end])
}

fn lines_match(expected: &[String], lines: &[&str]) -> bool {
    match expected.split_first() {
        None => lines.is_empty(),
        Some((first, rest)) if first == "..." => {
            (0..=lines.len()).any(|skipped| lines_match(rest, &lines[skipped..]))
        }
        Some((first, rest)) => match lines.split_first() {
            Some((line, others)) => line_matches(first, line) && lines_match(rest, others),
            None => false,
        },
    }
}

fn line_matches(expected: &str, line: &str) -> bool {
    let mut pieces = expected.split("[..]");
    let Some(mut rest) = pieces.next().and_then(|first| line.strip_prefix(first)) else { return false };
    let pieces: Vec<&str> = pieces.collect();
    let Some((last, middle)) = pieces.split_last() else { return rest.is_empty() };
    for piece in middle {
        match rest.find(piece) {
            Some(at) => rest = &rest[at + piece.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[test]
fn wildcards() {
    let expected = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>();
    assert!(matches(&expected(&[]), ""));
    assert!(!matches(&expected(&[]), "something\n"));
    assert!(matches(&expected(&["a [..] b", "c"]), "a x y b\nc\n\n"));
    assert!(!matches(&expected(&["a [..] b"]), "a b\n"));
    assert!(matches(&expected(&["[..]b[..]"]), "abc\n"));
    assert!(matches(&expected(&["first", "...", "last"]), "first\n1\n2\nlast\n"));
    assert!(matches(&expected(&["..."]), ""));
    assert!(!matches(&expected(&["...", "x"]), "a\nb\n"));
    assert!(matches(&expected(&["a"]), "a   \n"));
    assert!(!matches(&expected(&["a"]), "ab\n"));
}

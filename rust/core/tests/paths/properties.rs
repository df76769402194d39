//! What holds for every text.

use std::collections::BTreeMap;

use lamina_core::path::{ModuleTree, Path, PathError, Selector, SiteIndex, Slice};
use proptest::prelude::*;

use crate::{llama, path, texts};

fn index() -> impl Strategy<Value = i64> {
    prop_oneof![-9..10_i64, any::<i64>()]
}

fn name() -> impl Strategy<Value = String> {
    let plain = prop_oneof![
        Just("h".to_owned()),
        Just("output".to_owned()),
        Just("grad".to_owned()),
        Just("02".to_owned()),
        Just("-1".to_owned()),
        "[a-z_]{1,8}",
    ];
    prop_oneof![3 => plain, 1 => "[^.\\[\\]@\\s]{1,6}"]
}

/// White space that may stand inside brackets.
fn space() -> impl Strategy<Value = String> {
    prop_oneof![4 => Just(String::new()), 1 => "[ \t\n\u{a0}]{1,2}"]
}

fn selector() -> impl Strategy<Value = String> {
    let bound = || {
        prop::option::of(index()).prop_map(|bound| bound.map_or(String::new(), |b| b.to_string()))
    };
    let step = prop_oneof![
        Just(String::new()),
        Just(":".to_owned()),
        (1..9_i64).prop_map(|s| format!(":{s}"))
    ];
    let slice = (bound(), bound(), step, space())
        .prop_map(|(start, stop, step, space)| format!("{start}{space}:{space}{stop}{step}"));
    let list = (prop::collection::vec(index(), 1..5), space()).prop_map(|(entries, space)| {
        let entries: Vec<_> =
            entries.iter().map(|entry| format!("{space}{entry}{space}")).collect();
        format!("{},", entries.join(","))
    });
    let inside =
        prop_oneof![3 => index().prop_map(|index| index.to_string()), 1 => slice, 1 => list];
    (space(), inside, space())
        .prop_map(|(before, inside, after)| format!("[{before}{inside}{after}]"))
}

/// Texts that follow the grammar, canonical or not.
fn valid() -> impl Strategy<Value = String> {
    let step = prop_oneof![
        3 => name().prop_map(|name| format!(".{name}")),
        1 => (0..99_u32).prop_map(|index| format!(".{index}")),
        2 => selector(),
    ];
    let call = prop_oneof![
        4 => Just(String::new()),
        1 => (0..5_u32).prop_map(|call| format!("@{call}")),
        1 => (0..5_u32, 1..5_u32).prop_map(|(start, more)| format!("@{start}:{}", start + more)),
        1 => Just("@:".to_owned()),
        1 => (0..5_u32).prop_map(|call| format!("@{call}:")),
    ];
    let element = prop_oneof![
        index().prop_map(|index| format!("[ {index}]")),
        name()
            .prop_filter("a port or gradient", |name| !["input", "output", "grad"]
                .contains(&&**name))
            .prop_map(|name| format!(".{name}")),
    ];
    (
        prop::collection::vec(step, 0..6),
        prop_oneof![Just(".input"), Just(".output")],
        call,
        prop::collection::vec(element, 0..3),
        prop_oneof![2 => Just(""), 1 => Just(".grad")],
        prop_oneof![2 => Just(String::new()), 1 => selector()],
    )
        .prop_map(|(steps, port, call, elements, grad, position)| {
            format!("model{}{port}{call}{}{grad}{position}", steps.concat(), elements.concat())
        })
}

/// Texts near the grammar: any text over its own characters and words.
fn near() -> impl Strategy<Value = String> {
    let word = prop::sample::select(vec![
        "model",
        ".",
        "output",
        "input",
        ".output",
        "[",
        "]",
        ":",
        ",",
        "-",
        "0",
        "7",
        "02",
        "@",
        "grad",
        " ",
        "h",
        "\u{e9}",
        "\u{1f98a}",
        "9223372036854775808",
        "\0",
    ]);
    prop::collection::vec(word, 0..14).prop_map(|words| format!("model{}", words.concat()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn printing_is_canonical_for_everything_that_parses(text in valid()) {
        let parsed = path(&text);
        let printed = parsed.to_string();
        prop_assert_eq!(&path(&printed), &parsed);
        prop_assert_eq!(path(&printed).to_string(), printed);
    }

    #[test]
    fn near_misses_parse_to_a_fixed_point_or_name_a_byte_of_the_text(text in near()) {
        match text.parse::<Path>() {
            Ok(parsed) => prop_assert_eq!(path(&parsed.to_string()), parsed),
            Err(PathError::Syntax { at, .. }) => prop_assert!(text.is_char_boundary(at)),
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in any::<String>()) {
        let _ = text.parse::<Path>();
        let _ = format!("model.{text}.output").parse::<Path>();
    }

    #[test]
    fn no_lookup_panics(names in prop::collection::vec("[a-c0-9.\\[ ]{0,7}", 0..20), text in valid()) {
        let tree = ModuleTree::new(&names);
        let _ = tree.expand(&path(&text));
        let index = SiteIndex::new(&names, BTreeMap::new());
        let _ = index.find(&text);
    }

    #[test]
    fn expansion_of_a_slice_is_that_of_python(
        start in prop::option::of(-15..15_i64), stop in prop::option::of(-15..15_i64), every in 1..5_i64,
    ) {
        let selector = Slice::new(start, stop, Some(every)).unwrap();
        let bound = |bound: Option<i64>, otherwise: i64| match bound {
            Some(from_end @ ..0) => (from_end + 12).max(0),
            Some(bound) => bound.min(12),
            None => otherwise,
        };
        let expected: Vec<_> = (bound(start, 0)..bound(stop, 12))
            .step_by(usize::try_from(every).unwrap())
            .map(|layer| format!("model.model.layers[{layer}].output"))
            .collect();
        let found = llama().expand(&path(&format!("model.model.layers{selector}.output")));
        prop_assert_eq!(found.map(|paths| texts(&paths)).unwrap_or_default(), expected);
    }

    #[test]
    fn a_site_is_found_by_its_text_at_any_position(site in valid(), position in index()) {
        let site = path(&site);
        if !site.is_concrete() || site.position().is_some() {
            return Ok(());
        }
        let position = Selector::Index(position);
        let index = SiteIndex::new([site.to_string()], BTreeMap::new());
        prop_assert_eq!(index.find(&site.to_string()).unwrap(), [(0, None)]);
        let target = site.at(position.clone()).unwrap();
        prop_assert_eq!(index.find(&target.to_string()).unwrap(), [(0, Some(position.clone()))]);
        prop_assert_eq!(target.split(site.elements().len()).unwrap(), (site, Some(position)));
    }
}

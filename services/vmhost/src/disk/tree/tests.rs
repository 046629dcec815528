use proptest::prelude::*;

use super::*;

fn path(text: &str) -> Path {
    text.split('/').filter(|name| !name.is_empty()).map(|name| name.as_bytes().to_vec()).collect()
}

fn inode(kind: Kind) -> Inode {
    Inode { kind, attributes: Attributes::default() }
}

fn file(text: &str) -> Inode {
    inode(Kind::File(Content::Bytes(text.into())))
}

fn add(at: &str, inode: Inode) -> Change {
    Change::Add(path(at), inode)
}

fn link(at: &str, target: &str) -> Change {
    add(at, inode(Kind::Symlink(target.into())))
}

/// Every path with what is there.
fn listing(tree: &Tree) -> BTreeMap<String, String> {
    fn visit(tree: &Tree, id: InodeId, at: &str, all: &mut BTreeMap<String, String>) {
        let what = match &tree.inode(id).kind {
            Kind::Directory(names) => {
                for (name, &id) in names {
                    visit(tree, id, &format!("{at}/{}", String::from_utf8_lossy(name)), all);
                }
                format!("directory {:o}", tree.inode(id).attributes.mode)
            }
            Kind::File(Content::Bytes(bytes)) => format!("file {}", String::from_utf8_lossy(bytes)),
            Kind::Symlink(target) => format!("link {}", String::from_utf8_lossy(target)),
            other => format!("{other:?}"),
        };
        all.insert(at.to_owned(), what);
    }
    let mut all = BTreeMap::new();
    visit(tree, ROOT, "", &mut all);
    all
}

fn paths(tree: &Tree) -> Vec<String> {
    listing(tree).into_keys().filter(|path| !path.is_empty()).collect()
}

#[test]
fn whiteouts_take_away_what_is_below_and_nothing_of_their_own_layer() {
    let mut tree = Tree::default();
    tree.apply(vec![add("a/old", file("1")), add("b/old", file("1")), add("c", file("1"))]).expect("applies");
    // The whiteouts stand last, where they would be applied last by a tool that is not careful.
    let second = vec![
        add("a/new", file("2")),
        add("c", file("2")),
        Change::Empty(path("a")),
        Change::Remove(path("b")),
        Change::Remove(path("c")),
        Change::Remove(path("never/was")),
    ];
    tree.apply(second).expect("applies");
    assert_eq!(paths(&tree), ["/a", "/a/new", "/c"]);
}

#[test]
fn a_symbolic_link_on_the_way_is_followed_within_the_root_and_one_at_the_end_is_replaced() {
    let mut tree = Tree::default();
    let first = vec![
        add("usr/lib/x", file("1")),
        link("lib", "usr/lib"),
        link("up", "../../../../etc"),
        link("abs", "/usr"),
        link("end", "/usr/lib/x"),
    ];
    tree.apply(first).expect("applies");
    let second = vec![
        add("lib/y", file("2")),
        add("up/passwd", file("2")),
        add("abs/lib/../z", file("2")),
        add("end", file("2")),
    ];
    tree.apply(second).expect("applies");
    let all = listing(&tree);
    assert_eq!(all["/usr/lib/y"], "file 2");
    assert_eq!(all["/etc/passwd"], "file 2");
    assert_eq!(all["/end"], "file 2");
    assert_eq!(all["/usr/lib/x"], "file 1");
}

#[test]
fn links_that_go_in_circles_and_files_in_the_way_are_refused() {
    let mut tree = Tree::default();
    tree.apply(vec![link("a", "b"), link("b", "a"), add("file", file("1"))]).expect("applies");
    assert_eq!(tree.apply(vec![add("a/x", file("2"))]), Err(Conflict::TooManyLinks(path("a"))));
    assert_eq!(tree.apply(vec![add("file/x", file("2"))]), Err(Conflict::NotADirectory(path("file"))));
    assert_eq!(tree.apply(vec![add("", file("2"))]), Err(Conflict::RootReplaced));
    let lost = Change::Link(path("new"), path("nowhere"));
    assert_eq!(tree.apply(vec![lost]), Err(Conflict::BadLink(path("new"), path("nowhere"))));
}

#[test]
fn a_hard_link_reaches_into_the_layers_below_and_does_not_follow() {
    let mut tree = Tree::default();
    tree.apply(vec![add("a", file("1")), link("l", "a")]).expect("applies");
    tree.apply(vec![Change::Link(path("d/b"), path("a")), Change::Link(path("d/l"), path("l"))]).expect("applies");
    tree.apply(vec![add("a", file("2"))]).expect("applies");
    let all = listing(&tree);
    assert_eq!((all["/a"].as_str(), all["/d/b"].as_str(), all["/d/l"].as_str()), ("file 2", "file 1", "link a"));
}

/// What a layer of the property test does, on paths without links: they have tests of their own.
#[derive(Debug, Clone)]
enum Step {
    File(Vec<u8>, u8),
    Directory(Vec<u8>, u16),
    Remove(Vec<u8>),
    Empty(Vec<u8>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let path = || prop::collection::vec(0..3_u8, 1..4);
    let step = prop_oneof![
        (path(), any::<u8>()).prop_map(|(path, content)| Step::File(path, content)),
        (path(), 0..0o1000_u16).prop_map(|(path, mode)| Step::Directory(path, mode)),
        path().prop_map(Step::Remove),
        path().prop_map(Step::Empty),
    ];
    prop::collection::vec(step, 0..12)
}

/// A map of full paths: the plainest thing that can be meant by merging layers.
#[derive(Debug, Default, Clone)]
struct Model(BTreeMap<Vec<u8>, String>);

impl Model {
    fn apply(&mut self, layer: &[Step]) -> bool {
        let below = |path: &[u8], other: &[u8]| other.len() > path.len() && other.starts_with(path);
        for step in layer {
            match step {
                Step::Remove(path) => self.0.retain(|other, _| other != path && !below(path, other)),
                Step::Empty(path) => self.0.retain(|other, _| !below(path, other)),
                Step::File(..) | Step::Directory(..) => {}
            }
        }
        for step in layer {
            let (path, what) = match step {
                Step::Remove(_) | Step::Empty(_) => continue,
                Step::File(path, content) => (path, format!("file {content}")),
                Step::Directory(path, mode) => (path, format!("directory {mode:o}")),
            };
            for length in 1..path.len() {
                let parent = self.0.entry(path[..length].to_vec()).or_insert_with(|| "directory 755".to_owned());
                if parent.starts_with("file") {
                    return false;
                }
            }
            let stays = what.starts_with("directory");
            self.0.retain(|other, _| stays || !below(path, other));
            self.0.insert(path.clone(), what);
        }
        true
    }
}

proptest! {
    #[test]
    fn layers_merge_as_their_paths_say(layers in prop::collection::vec(steps(), 1..5)) {
        let (mut tree, mut model) = (Tree::default(), Model::default());
        for layer in &layers {
            let names = |path: &[u8]| -> Path { path.iter().map(|name| vec![b'a' + name]).collect() };
            let changes = layer.iter().map(|step| match step {
                Step::File(path, content) => Change::Add(names(path), file(&content.to_string())),
                Step::Directory(path, mode) => {
                    let attributes = Attributes { mode: *mode, ..Attributes::default() };
                    Change::Add(names(path), Inode { kind: Kind::Directory(BTreeMap::new()), attributes })
                }
                Step::Remove(path) => Change::Remove(names(path)),
                Step::Empty(path) => Change::Empty(names(path)),
            });
            let applies = model.apply(layer);
            prop_assert_eq!(tree.apply(changes.collect()).is_ok(), applies);
            if !applies {
                return Ok(());
            }
        }
        let mut seen = listing(&tree);
        seen.remove("");
        let meant: BTreeMap<String, String> = model.0.into_iter().map(|(path, what)| {
            (path.iter().map(|name| format!("/{}", char::from(b'a' + name))).collect(), what)
        }).collect();
        prop_assert_eq!(seen, meant);
    }
}

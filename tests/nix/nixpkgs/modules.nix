# The module system in small: options with defaults, mkIf, mkMerge, and lists that add up. It knows no types, no priorities, and
# not which options exist. What nobody defines is null.
{ pkgs, make }:
let
  tagged = tag: value: builtins.isAttrs value && (value._type or null) == tag;
  plain = value: builtins.isAttrs value && !(value ? _type) && (value.type or null) != "derivation";

  # A definition as those it is made of, each with the conditions it stands under.
  flatten = conditions: value:
    if tagged "merge" value then builtins.concatMap (flatten conditions) value.contents
    else if tagged "if" value then flatten (conditions ++ [ value.condition ]) value.content
    else if tagged "option" value then (if value ? default then flatten conditions value.default else [ ])
    else [{ inherit conditions value; }];

  merge = definitions:
    if definitions != [ ] && builtins.all (definition: plain definition.value) definitions
    then builtins.zipAttrsWith (_: merged: merge (builtins.concatLists merged)) (map spread definitions)
    else leaf (builtins.filter (definition: builtins.all (condition: condition) definition.conditions) definitions);
  spread = definition: builtins.mapAttrs (_: flatten definition.conditions) definition.value;
  leaf = active:
    let values = map (definition: definition.value) active; last = builtins.elemAt values (builtins.length values - 1); in
    if values == [ ] then null
    else if builtins.all builtins.isList values then builtins.concatLists values
    else if builtins.all plain values then builtins.foldl' (a: b: a // b) { } values
    else last;

  lib = {
    mkOption = option: option // { _type = "option"; };
    mkEnableOption = description: lib.mkOption { default = false; inherit description; };
    mkIf = condition: content: { _type = "if"; inherit condition content; };
    mkMerge = contents: { _type = "merge"; inherit contents; };
    types = { str = "str"; path = "path"; package = "package"; enum = values: values; attrsOf = type: type; };
    getExe = package: "${package}/bin/${package.meta.mainProgram}";

    nixosSystem = { system, modules }:
      let
        load = module:
          let loaded = if builtins.isFunction module then module { inherit config lib pkgs; } else module; in
          if loaded ? options || loaded ? config then [ (loaded.options or { }) (loaded.config or { }) ] else [ loaded ];
        config = merge (builtins.concatMap (flatten [ ]) (builtins.concatMap load ([ base ] ++ modules)));
        wrong = builtins.filter (assertion: !assertion.assertion) (if config.assertions == null then [ ] else config.assertions);
        # All of the configuration, with the derivations that it names.
        base.assertions = [ ];
        base.system.build.toplevel =
          if wrong != [ ] then throw (builtins.head wrong).message
          else make "nixos-${config.networking.hostName}" [ "out" ]
            { configuration = builtins.toJSON (builtins.removeAttrs config [ "system" "assertions" ]); };
      in
      { inherit config; };
  };
in
lib

#![cfg_attr(fuzzing, no_main)]
qevm_fuzz::entry!(migration_lines);

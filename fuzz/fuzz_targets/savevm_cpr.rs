#![cfg_attr(fuzzing, no_main)]
qevm_fuzz::entry!(savevm_cpr);

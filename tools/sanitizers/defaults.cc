// The sanitizers' settings, compiled into every binary of a sanitizer configuration so that a test
// needs no environment. Each suppression says why it is no fault of ours.

extern "C" const char* __asan_default_options() {
  return "detect_stack_use_after_return=1"
         // The CUDA driver maps memory where the sanitizer would protect its gap.
         ":protect_shadow_gap=0";
}

extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1"; }

extern "C" const char* __lsan_default_suppressions() {
  return
      // Open MPI, its libraries and UCX keep what they allocated for the life of the process.
      "leak:libmpi.so\n"
      "leak:libopen-rte.so\n"
      "leak:libopen-pal.so\n"
      "leak:libucs.so\n"
      "leak:libucp.so\n"
      "leak:libuct.so\n"
      "leak:libevent\n";
}

extern "C" const char* __tsan_default_suppressions() {
  return
      // Compiled without the sanitizer: it sees neither their locks nor their atomics.
      "called_from_lib:libmpi.so\n"
      "called_from_lib:libopen-rte.so\n"
      "called_from_lib:libopen-pal.so\n"
      "called_from_lib:libucp.so\n"
      "called_from_lib:libuct.so\n"
      "called_from_lib:libucs.so\n"
      "called_from_lib:libucm.so\n"
      // UCX unlocks, as the process ends, what it had locked before the sanitizer began.
      "mutex:_dl_call_fini\n"
      // The same within Open MPI's plugins, whose frames a report names.
      "deadlock:mca_btl_\n"
      "mutex:mca_pml_\n"
      "race:mca_\n"
      // Abseil's detector of deadlocks, under a lock of its own.
      "race:absl::debian3::synchronization_internal::GraphCycles\n";
}

"""Files, hashes, JSON lines, progress bars: one way to do each, for the whole package."""

from frozenprefix.utils.files import (
    atomic_file,
    atomic_folder,
    encode_text,
    file_state,
    read_text,
    recover_folder,
    safe_file_name,
    write_bytes_atomic,
    write_text_atomic,
)
from frozenprefix.utils.hashing import content_hash, file_sha256, tree_sha256
from frozenprefix.utils.jsonl import append_jsonl, parse_json, read_jsonl, write_jsonl
from frozenprefix.utils.locks import hold_lock
from frozenprefix.utils.log import show_log
from frozenprefix.utils.outputs import check_output, check_run_folder
from frozenprefix.utils.progress import progress_bar
from frozenprefix.utils.reports import report, report_left_out, summary
from frozenprefix.utils.system_errors import is_out_of_memory, system_error
from frozenprefix.utils.text import replace_surrogates
from frozenprefix.utils.user_cache import build_once, user_cache

__all__ = [
    "append_jsonl",
    "atomic_file",
    "atomic_folder",
    "build_once",
    "check_output",
    "check_run_folder",
    "content_hash",
    "encode_text",
    "file_sha256",
    "file_state",
    "hold_lock",
    "is_out_of_memory",
    "parse_json",
    "progress_bar",
    "read_jsonl",
    "read_text",
    "recover_folder",
    "replace_surrogates",
    "report",
    "report_left_out",
    "safe_file_name",
    "show_log",
    "summary",
    "system_error",
    "tree_sha256",
    "user_cache",
    "write_bytes_atomic",
    "write_jsonl",
    "write_text_atomic",
]

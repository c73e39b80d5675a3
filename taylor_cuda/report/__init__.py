"""What a run leaves behind for people: tables, the picture of the widths, the summary."""

from taylor_cuda.report.plot import write_widths_svg
from taylor_cuda.report.summary import is_summary_of, summary_dict, write_summary
from taylor_cuda.report.tables import measured_lines, run_table

__all__ = ["is_summary_of", "measured_lines", "run_table", "summary_dict", "write_summary", "write_widths_svg"]

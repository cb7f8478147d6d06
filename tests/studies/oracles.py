"Shared by the tests of studies: what a page shows"
import json
import math
import re
import statistics

from scipy import stats


def saved_tables(page):
    "The rows of each table in the saved outputs of a page, without head"
    found = []
    for cell in json.loads(page.read_text())["cells"]:
        for output in cell.get("outputs", ()):
            body = re.search("<tbody>(.*)</tbody>", "".join(output.get("data", {}).get("text/html", "")), re.DOTALL)
            rows = re.findall("<tr>(.*?)</tr>", body[1], re.DOTALL) if body else []
            if rows: found.append([re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in rows])
    return found


def with_student(differences, level=0.95, digits=1):
    "Mean of two differences or more, and Student's interval by its formula"
    mean, n = statistics.mean(differences), len(differences)
    reach = stats.t.ppf((1 + level) / 2, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return f"{mean:+.{digits}f} [{mean - reach:+.{digits}f}, {mean + reach:+.{digits}f}]"

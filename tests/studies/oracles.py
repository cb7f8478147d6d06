"Shared by the tests of studies: what a page shows"
import json
import re


def saved_tables(page):
    "The rows of each table in the saved outputs of a page, without head"
    found = []
    for cell in json.loads(page.read_text())["cells"]:
        for output in cell.get("outputs", ()):
            body = re.search("<tbody>(.*)</tbody>", "".join(output.get("data", {}).get("text/html", "")), re.DOTALL)
            rows = re.findall("<tr>(.*?)</tr>", body[1], re.DOTALL) if body else []
            if rows: found.append([re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in rows])
    return found

"""config.properties is read as Java reads it: what we check is what TorchServe will do."""

import base64
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from gpt_fast.serve.startup_check import check_properties, parse_properties
from support.examples import examples

JAVA = """
import java.io.*; import java.nio.charset.StandardCharsets; import java.util.*;
public class Read {
  public static void main(String[] args) throws Exception {
    BufferedReader in = new BufferedReader(new InputStreamReader(System.in));
    for (String line; (line = in.readLine()) != null; ) {
      Properties p = new Properties();
      StringBuilder out = new StringBuilder("ok");
      try {
        p.load(new ByteArrayInputStream(Base64.getDecoder().decode(line)));
        for (String key : new TreeSet<>(p.stringPropertyNames()))
          for (String part : new String[] {key, p.getProperty(key)})
            out.append(' ').append('=').append(
                Base64.getEncoder().encodeToString(part.getBytes(StandardCharsets.UTF_16BE)));
      } catch (IllegalArgumentException e) { out = new StringBuilder("malformed"); }
      System.out.println(out); System.out.flush();
    }
  }
}
"""


@pytest.fixture(scope="module")
def java(tmp_path_factory: pytest.TempPathFactory) -> subprocess.Popen[str]:
    """A Java that answers, line by line, what Properties.load makes of a text."""
    if not shutil.which("javac"):
        pytest.skip("needs a JDK to ask java.util.Properties itself")
    directory = tmp_path_factory.mktemp("java")
    (directory / "Read.java").write_text(JAVA)
    subprocess.run(["javac", "Read.java"], cwd=directory, check=True, timeout=120)
    process = subprocess.Popen(
        ["java", "-cp", str(directory), "Read"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()


def ask(java: subprocess.Popen[str], text: str) -> dict[str, str] | None:
    """What Java reads; None where it gives up."""
    assert java.stdin and java.stdout
    java.stdin.write(base64.b64encode(text.encode("latin-1")).decode() + "\n")
    java.stdin.flush()
    status, *parts = java.stdout.readline().split()
    words = [base64.b64decode(part.removeprefix("=")).decode("utf-16-be", "surrogatepass") for part in parts]
    return None if status == "malformed" else dict(zip(words[::2], words[1::2], strict=True))


PIECES = st.sampled_from(
    [
        "\\",
        "\\\\",
        "\n",
        "\r",
        "\r\n",
        "=",
        ":",
        " ",
        "\t",
        "\f",
        "#",
        "!",
        "key",
        "a",
        "1",
        "\\u0041",
        "\\u",
        "\\u00",
        "\\t",
        "\\n",
        "\\:",
        "\\=",
        "\\ ",
        "\xe9",
        "inference_address=http://0.0.0.0:8080",
        "# x\\",
    ]
)


@pytest.mark.slow
@examples(400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(PIECES, max_size=14).map("".join))
def test_properties_are_read_as_java_reads_them(java: subprocess.Popen[str], text: str) -> None:
    expected = ask(java, text)
    if expected is None:
        with pytest.raises(ValueError, match="malformed"):
            parse_properties(text)
    else:
        assert parse_properties(text) == expected


PUBLIC = "inference_address=http://0.0.0.0:8080\n"


@pytest.mark.parametrize(
    "text",
    [
        "# a comment that ends in a backslash \\\n" + PUBLIC,
        "! another \\\\\\\n" + PUBLIC,
        "inference_\\\n   address = http\\://0.0.0.0\\:8080",
        "inference_address\\u003d=x\ninference_addres\\u0073 http://0.0.0.0:8080",
        "inference_address=http://127.0.0.1:8080\r" + PUBLIC,
        "inference_address=[27.0.0.1",  # half a bracket is no address
        "inference_address=http://[::1",
    ],
)
def test_a_public_address_cannot_hide(text: str) -> None:
    problems = check_properties("disable_token_authorization=true\n" + text)
    assert any(problem.startswith("inference_address: not a loopback address") for problem in problems), problems


def test_a_malformed_escape_is_one_line() -> None:
    (problem,) = check_properties("key=\\u12")
    assert problem.startswith("malformed \\u escape")


@pytest.mark.slow  # starts a Java process
def test_the_shipped_file_is_read_alike(java: subprocess.Popen[str]) -> None:
    text = (Path(__file__).parents[2] / "deploy" / "config.properties").read_text(encoding="latin-1")
    assert ask(java, text) == parse_properties(text)
